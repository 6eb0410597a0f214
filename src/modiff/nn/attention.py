"""Quantizers of the two products inside attention: softmax(q k^T / sqrt(d)) v."""

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from modiff.config import AttentionConfig
from modiff.core.quantizer import Quantizer
from modiff.errors import StateError
from modiff.nn import traced
from modiff.nn.clock import Clock


class QuantizedAttention:
    """Quantizes q, k, v and the softmax output of one attention module (Q-Diffusion, section 4.3).

    While the module's forward runs, its calls of `scaled_dot_product_attention` come here, whichever processor makes
    them. `attach` puts `forward` in front of the module's own, `detach` takes it away.

    clock: of the model, for scales per step. With bits None everywhere the call is passed on unchanged.
    quantizers: by operand, "q", "k", "v" and "softmax"; None where the operand stays in full precision.
    """

    def __init__(self, config: AttentionConfig, name: str, clock: Clock | None = None) -> None:
        self.name, self.clock = name, clock
        self.stepwise = any(each.step_groups != 1 for each in (config.operands, config.softmax))
        moment = None if clock is None else clock.moment
        # v is summed over its tokens, so an integer matmul allows it no scale per token
        automatic: dict[str, str] = {"q": "token", "k": "token", "v": "sample", "softmax": "token"}
        self.quantizers: dict[str, Quantizer | None] = {}
        for operand, granularity in automatic.items():
            each = config.softmax if operand == "softmax" else config.operands
            granularity = granularity if each.granularity == "auto" else each.granularity
            self.quantizers[operand] = None if each.bits is None else Quantizer(each, granularity, -1, (1,), moment)
        self.number = traced.number_for(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy has a number of its own."""
        self.__dict__.update(state)
        self.number = traced.number_for(self)

    def attach(self, module: nn.Module) -> None:
        """Quantize the attention of the module from now on."""
        self.replaced = module.__dict__.get("forward")  # by another library, before
        self.original = self.replaced or functools.partial(type(module).forward, module)  # a pickle knows it by name
        module.__dict__["forward"] = self.forward  # a bound method: copy.deepcopy takes it to the copy's own quantizers

    def attached(self, module: nn.Module) -> bool:
        """Whether the module still runs `forward`, not what another library put in front of it."""
        return module.__dict__.get("forward") == self.forward

    def detach(self, module: nn.Module) -> None:
        """Give the module its own forward back."""
        del module.__dict__["forward"]
        if self.replaced is not None:
            module.__dict__["forward"] = self.replaced

    @functools.wraps(nn.Module.__call__, assigned=())  # under its own name, by which a pickle finds it
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, its attention quantized. Raises: StateError if it made no attention call."""
        mode = _Intercept(self)
        with mode:  # hooks would miss Ctrl-C: torch calls them after an Exception only
            output = self.original(*args, **kwargs)
        if mode.calls == 0:
            raise StateError(
                f"{self.name}: expected a call of torch's scaled_dot_product_attention, got none. Its processor or "
                "backend computes attention otherwise, so its operands cannot be quantized. Use diffusers' default "
                "processor and backend, or AttentionConfig(exclude=...)."
            )
        return output

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """`scaled_dot_product_attention` of quantized operands, (..., N, D) x (..., M, D) x (..., M, E) -> (..., N, E).

        In a graph of torch.compile it is one operator where its scales change from step to step.
        Cost: with softmax bits, (..., N, M) probabilities in memory in float32; without, torch's own kernel.
        """
        if self.stepwise and self.clock is not None and torch.compiler.is_compiling():
            arguments = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
            return traced.attend(self.clock.token, *arguments, self.number)
        q, k, v = (self._quantized(name, x) for name, x in (("q", query), ("k", key), ("v", value)))
        if self.quantizers["softmax"] is None:
            return functional.scaled_dot_product_attention(
                q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        # autocast would round scores and probabilities to 16 bits
        with torch.autocast(query.device.type, enabled=False):
            if enable_gqa:
                k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
            q, k, v = (x if x.dtype == torch.float64 else x.float() for x in (q, k, v))
            scores = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
            if is_causal:
                attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            probabilities = self._quantized("softmax", _softmax(scores, attn_mask))
            return (functional.dropout(probabilities, dropout_p) @ v).to(query.dtype)

    def _quantized(self, operand: str, x: Tensor) -> Tensor:
        quantizer = self.quantizers[operand]
        code = None if quantizer is None else quantizer(x if x.dtype == torch.float64 else x.float())
        return x if code is None else code.value().to(x.dtype)


class _Intercept(TorchFunctionMode):
    """Sends attention calls to the quantizers; everything else passes."""

    def __init__(self, attention: QuantizedAttention) -> None:
        super().__init__()
        self.attention, self.calls = attention, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.scaled_dot_product_attention:
            self.calls += 1
            return self.attention.attend(*args, **kwargs or {})
        if func is Tensor.unflatten:  # under a mode torch.compile cannot follow its super(); the same operator by name
            func = torch.unflatten
        return func(*args, **kwargs or {})


def _softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return scores.softmax(-1)
    masked = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)
    return masked.softmax(-1).masked_fill((masked == -torch.inf).all(-1, keepdim=True), 0.0)
