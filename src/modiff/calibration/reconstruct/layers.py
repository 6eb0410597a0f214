"""Layers without states, for learning: in full precision, or quantized with gradients through the rounding."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from modiff.calibration.reconstruct.config import Activations
from modiff.core.adaround import AdaRound
from modiff.core.learned_scale import LearnedScale, fake_quantize_through
from modiff.core.quantizer import Quantizer
from modiff.errors import StateError
from modiff.model.attach import required_attachment
from modiff.model.attention import quantized_attention
from modiff.nn import ModulatedLayer


class Trainee:
    """A layer as one differentiable function of its input: quantized weight, activation quantized or not, no states.

    rounding, scales: replace the weight's codes and the quantizer's scales while they are learned, one for each run of
        channels; without gradients the rounding is cut to integers, to see what would be kept.
    values: a weight to compute with instead.
    drop: a probability, and a generator: each value of the input stays as it is with this probability (QDrop).
    """

    def __init__(self, quantized: ModulatedLayer, activations: Activations) -> None:
        self.quantized, self.activations = quantized, activations
        self.bits = quantized.config.activation.bits or 8
        self.rounding: tuple[AdaRound, ...] = ()
        self.scales: tuple[LearnedScale, ...] = ()
        self.values: Tensor | None = None
        self.drop: tuple[float, torch.Generator] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """The layer's output."""
        with torch.autocast(x.device.type, enabled=False):
            value = self.prepare(x)
            if self.activations == "quantized":
                coded = self.code(value)
                value = coded if self.drop is None else torch.where(self._dropped(value), value, coded)
            return self.operate(value).to(x.dtype)

    def prepare(self, x: Tensor) -> Tensor:
        """The input as the quantizer sees it: at least float32, smoothed and rotated if the layer does so."""
        return self.quantized.spec.prepared(x.to(torch.promote_types(x.dtype, torch.float32)), None)

    def operate(self, value: Tensor) -> Tensor:
        """A(value) + bias with the quantized weight."""
        bias = None if self.quantized.bias is None else self.quantized.bias.detach().to(value.dtype)
        return self.quantized.spec.operate(value, self._weight(value.dtype), bias)

    def code(self, value: Tensor) -> Tensor:
        """`value` as the quantizer sends it, with gradients through the rounding."""
        quantizer = self.quantized.quantizer
        if quantizer is None:
            return value
        runs, axis = value.split(list(quantizer.runs), quantizer.channel_dim), quantizer.channel_dim
        if self.scales:
            return torch.cat([scale(x) for scale, x in zip(self.scales, runs, strict=True)], axis)
        # what a modulated layer has measured belongs to its residuals, so its values get fresh scales
        code = quantizer(value.detach()) if self.quantized.inputs is None else quantizer.fresh(value.detach())
        if code is None:
            return value
        pairs = zip(runs, code.parts, strict=True)
        return torch.cat([fake_quantize_through(x, q, quantizer.bits) for x, (_, q) in pairs], axis)

    def _dropped(self, value: Tensor) -> Tensor:
        share, generator = self.drop or (0.0, None)
        return (torch.rand(value.shape, generator=generator) < share).to(value.device)

    def _weight(self, dtype: torch.dtype) -> Tensor:
        if self.values is not None:
            return self.values.to(dtype)
        if not self.rounding:
            return self.quantized.quantized_weight.dense(self.quantized.weight, dtype)
        return torch.cat([r.soft() if torch.is_grad_enabled() else r.hard() for r in self.rounding], 1).to(dtype)


class Through:
    """An attention quantizer with gradients through its rounding; `scales` replace its own while they are learned."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer, self.bits = quantizer, quantizer.bits
        self.scales: tuple[LearnedScale, ...] = ()

    def __call__(self, x: Tensor) -> "Through":
        """Itself, as the code of an operand."""
        code = None if self.scales else self.quantizer(x.detach())
        self.operand = self.scales[0](x) if self.scales else x
        if code is not None:
            self.operand = x + (code.value().to(x.dtype) - x).detach()
        return self

    def value(self) -> Tensor:
        """The operand as it was quantized last."""
        return self.operand


@contextmanager
def computing(forwards: Mapping[ModulatedLayer, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Let layers compute with other functions while the body runs; they keep their parameters and hooks.

    Raises: StateError if another library replaced a layer's forward: its function would be lost.
    """
    before = {quantized: quantized.__dict__.get("forward") for quantized in forwards}
    for quantized, forward in before.items():
        if forward is not None and not isinstance(forward, Trainee):
            raise StateError(
                f"{quantized.name}: expected a layer with its own forward, got one that another library replaced, as "
                "offloading does. It cannot compute otherwise meanwhile. Undo the offloading first."
            )
    try:
        for quantized, function in forwards.items():
            quantized.__dict__["forward"] = function
        yield
    finally:
        for quantized, forward in before.items():
            quantized.__dict__.pop("forward", None)
            quantized.__dict__ |= {} if forward is None else {"forward": forward}


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Let a model compute as if modiff were not applied, without a trajectory.

    Raises: StateError if modiff was not applied, or the floats of a layer are gone because it was packed.
    """
    attachment = required_attachment(model, "full_precision")
    for name, quantized in attachment.layers.items():
        if quantized.packed:
            raise StateError(
                f"{name}: expected a weight with its floats, got a packed one. Full precision is what is learned "
                "from. Load the original model, apply modiff and learn before packing."
            )
    forwards = {quantized: attachment.originals[name].forward for name, quantized in attachment.layers.items()}
    with computing(forwards), _attention(model, None):
        yield


@contextmanager
def without_states(model: nn.Module, activations: Activations) -> Iterator[dict[str, Trainee]]:
    """Let a model compute with quantized weights and no memory, differentiably; the layers by name.

    Attention products are quantized if activations are, with gradients through the rounding.
    """
    quantized_layers = required_attachment(model, "without_states").layers
    trainees = {name: Trainee(quantized, activations) for name, quantized in quantized_layers.items()}
    with computing({t.quantized: t for t in trainees.values()}), _attention(model, activations):
        yield trainees


@contextmanager
def _attention(model: nn.Module, activations: Activations | None) -> Iterator[None]:
    """Attention in full precision, or with gradients through its rounding."""
    with ExitStack() as stack:
        for module in quantized_attention(model).values():
            stack.callback(module.quantizers.update, dict(module.quantizers))
            for operand, quantizer in module.quantizers.items():
                through = activations == "quantized" and quantizer is not None
                module.quantizers[operand] = Through(quantizer) if through else None
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout and the like off while the body runs, then as they were."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
