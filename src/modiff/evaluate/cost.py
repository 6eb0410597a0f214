"""What a layer, a step and a trajectory cost: MACs, bit-operations, bytes of weights and of states.

    MACs    multiply-accumulates of linear layers, convolutions and attention products, for the whole batch;
            padding and masked positions included. Norms, activations, additions and biases are not counted.
    BOPs    MACs x weight bits x activation bits. A measure of work on paper, not of speed.

The 35.7M-parameter CIFAR-10 DDPM U-Net, batch 1: convolutions and linear layers 6.054 GMAC, attention products 0.168.
The paper's 1636 GBOPs at W8A32 are 1636 / (8 x 32) = 6.39 GMAC. It does not say how it counted, but
6.054 + 2 x 0.168 = 6.390 meets the figure within its rounding: attention at two operations per MAC, all else at one,
and billed at the bits of the layers although it runs in full precision. Attention counted once gives 6.222 GMAC, or
1593 GBOPs. The paper also leaves out that the first step runs in full precision; `first_step_activation_bits` does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from modiff.core.predictors import predictor_named
from modiff.errors import ConfigError

Kind = Literal["linear", "conv", "transposed_conv", "attention"]
BitsOf = Callable[[str], tuple[int | None, int | None]]
"""A layer's name to its (weight bits, activation bits); None is full precision."""

FULL_PRECISION_BITS = 32


def linear_macs(input_shape: Sequence[int], in_features: int, out_features: int) -> int:
    """MACs of a linear layer: rows x in x out, the rows being all axes of the input but the last.

    >>> linear_macs((2, 16, 64), 64, 256)
    524288
    """
    return prod(input_shape[:-1]) * in_features * out_features


def conv_macs(output_shape: Sequence[int], in_channels: int, kernel_size: Sequence[int], groups: int = 1) -> int:
    """MACs of a convolution: each output element sums in/groups x kernel products, padding included.

    >>> conv_macs((1, 128, 32, 32), 3, (3, 3))
    3538944
    """
    return prod(output_shape) * (in_channels // groups) * prod(kernel_size)


def transposed_conv_macs(
    input_shape: Sequence[int], out_channels: int, kernel_size: Sequence[int], groups: int = 1
) -> int:
    """MACs of a transposed convolution: each input element goes to out/groups x kernel places, cropped or not.

    >>> transposed_conv_macs((1, 64, 8, 8), 32, (4, 4))
    2097152
    """
    return prod(input_shape) * (out_channels // groups) * prod(kernel_size)


def attention_macs(batch: int, heads: int, queries: int, keys: int, head_dim: int, value_dim: int) -> int:
    """MACs of both attention products, Q K^T and softmax V. Softmax is not counted, masked positions are.

    >>> attention_macs(1, 1, 256, 256, 256, 256)
    33554432
    """
    return batch * heads * queries * keys * (head_dim + value_dim)


def _width(bits: int | None) -> int:
    """Bits as a number; None is full precision."""
    if bits is None:
        return FULL_PRECISION_BITS
    if not 0 <= bits <= FULL_PRECISION_BITS:
        raise ConfigError(f"bits: expected None or 0 to 32, got {bits}. None is full precision. Use one of these.")
    return bits


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """One layer's work in one step, whole batch: sums over its `calls` calls.

    kind "attention": all matrix products that the module `name` runs outside of linear and convolution layers, whether
    of two activations or with a bare parameter. Its `calls` are products (a fused attention is one), its elements
    are operands and results; it has no weights and keeps no states.
    """

    name: str
    kind: Kind
    macs: int
    calls: int
    weight_elements: int
    input_elements: int
    output_elements: int

    def bops(self, weight_bits: int | None, activation_bits: int | None) -> int:
        """Bit-operations of one step: MACs x weight bits x activation bits; None is 32 bits, 0 is a skipped layer.

        Raises: ConfigError if bits are outside 0..32.
        """
        return self.macs * _width(weight_bits) * _width(activation_bits)

    def trajectory_bops(
        self,
        weight_bits: int | None,
        activation_bits: int | None,
        steps: int,
        first_step_activation_bits: int | Literal["same"] | None = "same",
    ) -> int:
        """Bit-operations of `steps` steps, the first one at bits of its own.

        first_step_activation_bits: "same" ignores that the first step has no past, as the paper does; None is a first
        step in full precision; n rounds of b bits are n x b. A layer in full precision anyway (activation_bits None)
        stays so.
        Raises: ConfigError if steps is under 1 or bits are outside 0..32.
        """
        if steps < 1:
            raise ConfigError(f"steps: expected 1 or more, got {steps}. A trajectory has a first step. Use steps=1.")
        special = first_step_activation_bits != "same" and activation_bits is not None
        first = cast("int | None", first_step_activation_bits) if special else activation_bits
        return self.bops(weight_bits, first) + (steps - 1) * self.bops(weight_bits, activation_bits)

    def weight_bytes(self, bits: int | None) -> int:
        """Bytes of the weight codes packed tightly, rounded up; None is float32. Scales and biases are not counted."""
        return -(-self.weight_elements * _width(bits) // 8)

    def state_bytes(self, state_dtype_bytes: int = 4, predictor: str = "hold") -> int:
        """Bytes of input state and output state together; predictors keep those of steps before too.

        The paper's memory table counts the output state alone, at the activation bits; it is a running sum, so no
        b-bit quantity.
        Raises: ConfigError if the predictor is unknown.
        """
        if self.kind == "attention":
            return 0
        kept = predictor_named(predictor).past_states
        return kept * (self.input_elements + self.output_elements) * state_dtype_bytes


@dataclass(frozen=True)
class ModelCost:
    """The costs of a model's layers in the order of their first call; totals are sums over the layers."""

    layers: tuple[LayerCost, ...]

    def select(self, keep: Callable[[LayerCost], bool]) -> ModelCost:
        """The cost of the layers that `keep` says yes to, such as those taken, or all that is not attention."""
        return ModelCost(tuple(layer for layer in self.layers if keep(layer)))

    @property
    def macs(self) -> int:
        """MACs of one step."""
        return sum(layer.macs for layer in self.layers)

    def bops(
        self,
        bits_of: BitsOf,
        steps: int = 1,
        first_step_activation_bits: int | Literal["same"] | None = "same",
    ) -> int:
        """Bit-operations of a trajectory of `steps` steps (1: of a step). See LayerCost.trajectory_bops."""
        return sum(
            layer.trajectory_bops(*bits_of(layer.name), steps, first_step_activation_bits) for layer in self.layers
        )

    def weight_bytes(self, bits_of: BitsOf) -> int:
        """Bytes of all weight codes, whatever the number of steps."""
        return sum(layer.weight_bytes(bits_of(layer.name)[0]) for layer in self.layers)

    def state_bytes(self, state_dtype_bytes: int = 4, predictor: str = "hold") -> int:
        """Bytes of the states of all layers, resident from the first step to the last; `select` the modulated ones."""
        return sum(layer.state_bytes(state_dtype_bytes, predictor) for layer in self.layers)


def measure_cost(model: nn.Module, forward: Callable[[], object]) -> ModelCost:
    """Run `forward()` once, without gradients, and count what `model` does in it.

    forward: one denoising step, such as `lambda: unet(x, t)`. Works on the meta device too, where it costs no time.
    Counted: every nn.Linear, nn.Conv* and nn.ConvTranspose* (subclasses included) by its shapes alone, whatever it
    runs inside; and matrix products outside of these (torch's fused attention, bmm, matmul, einsum, functional linear),
    charged to the innermost module that ran them. Functional convolutions are not counted. A module with two names
    goes by its first.
    Raises: ConfigError if forward() does not call the model; what forward() raises. The hooks are gone either way.
    """
    recorder = _Recorder()
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.callback(module.register_forward_pre_hook(recorder.enter(name), prepend=True).remove)
            leave = module.register_forward_hook(recorder.leave(name), with_kwargs=True, always_call=True)
            hooks.callback(leave.remove)
        # nn.MultiheadAttention's fast path is one operation that hides its products
        hooks.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        hooks.enter_context(torch.no_grad())
        hooks.enter_context(_ProductMode(recorder))
        forward()
    if not recorder.called:
        raise ConfigError(
            "measure_cost: expected forward() to call the model, got no call. It may run a copy or another part. "
            "Pass the module that forward() runs."
        )
    return ModelCost(tuple(recorder.costs.values()))


LINEAR = (nn.Linear,)
CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONV = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (*LINEAR, *CONV, *TRANSPOSED_CONV)


def _layer_cost(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> LayerCost:
    """The cost of one call of a linear or convolution layer with input x and output y."""
    if isinstance(layer, LINEAR):
        kind: Kind = "linear"
        macs = linear_macs(x.shape, layer.in_features, layer.out_features)
        weights = layer.in_features * layer.out_features
    else:
        conv = cast("nn.Conv2d", layer)  # all six share these attributes
        weights = conv.in_channels * conv.out_channels // conv.groups * prod(conv.kernel_size)
        if isinstance(layer, TRANSPOSED_CONV):
            kind = "transposed_conv"
            macs = transposed_conv_macs(x.shape, conv.out_channels, conv.kernel_size, conv.groups)
        else:
            kind = "conv"
            macs = conv_macs(y.shape, conv.in_channels, conv.kernel_size, conv.groups)
    return LayerCost(
        name=name,
        kind=kind,
        macs=macs,
        calls=1,
        weight_elements=weights,
        input_elements=x.numel(),
        output_elements=y.numel(),
    )


class _Recorder:
    """Knows which modules are running, and sums the costs of each name."""

    def __init__(self) -> None:
        self.costs: dict[str, LayerCost] = {}
        self.running: list[tuple[str, bool]] = []  # (name, is a layer counted by its shapes), outermost first
        self.called = False

    @property
    def inside_layer(self) -> bool:
        """Whether a layer counted by its shapes is running: its own products are in its formula already."""
        return any(is_layer for _, is_layer in self.running)

    def add(self, cost: LayerCost) -> None:
        """Sum the cost to that of earlier calls."""
        past = self.costs.get(cost.name)
        if past is not None:
            cost = replace(
                cost,
                macs=past.macs + cost.macs,
                calls=past.calls + cost.calls,
                input_elements=past.input_elements + cost.input_elements,
                output_elements=past.output_elements + cost.output_elements,
            )
        self.costs[cost.name] = cost

    def enter(self, name: str) -> Callable[..., None]:
        """Forward pre-hook of the module."""

        def hook(module: nn.Module, args: tuple[object, ...]) -> None:
            self.called = True
            self.running.append((name, isinstance(module, LAYERS)))

        return hook

    def leave(self, name: str) -> Callable[..., None]:
        """Forward hook of the module; after an exception inside it, `output` is None."""

        def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
            self.running.pop()
            if isinstance(module, LAYERS) and isinstance(output, Tensor) and not self.inside_layer:
                x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
                self.add(_layer_cost(name, module, x, output))

        return hook

    def add_product(self, macs: int, operands: Sequence[Tensor], output_elements: int) -> None:
        """A matrix product, charged to the innermost running module; outside the model it is not counted."""
        if self.running and not self.inside_layer:
            cost = LayerCost(
                name=self.running[-1][0],
                kind="attention",
                macs=macs,
                calls=1,
                weight_elements=0,
                input_elements=sum(operand.numel() for operand in operands),
                output_elements=output_elements,
            )
            self.add(cost)


aten = torch.ops.aten
LEFT_OPERAND: dict[object, int] = {
    aten.mm: 0,
    aten.bmm: 0,
    aten.mv: 0,
    aten.dot: 0,
    aten._int_mm: 0,
    aten.addmm: 1,
    aten.baddbmm: 1,
    aten.addmv: 1,
}
"""Where the left one of the two factors is among the arguments; the right one follows it."""

FUSED_ATTENTION: frozenset[object] = frozenset(
    {
        aten._scaled_dot_product_flash_attention_for_cpu,
        aten._scaled_dot_product_flash_attention,
        aten._scaled_dot_product_efficient_attention,
        aten._scaled_dot_product_cudnn_attention,
        aten._scaled_dot_product_fused_attention_overrideable,
    }
)
"""What torch's scaled_dot_product_attention becomes; its plain form becomes two bmm."""


class _ProductMode(TorchDispatchMode):
    """Sees each operation that torch executes and records the matrix products."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        kwargs = kwargs or {}
        operation = func.overloadpacket
        if operation in LEFT_OPERAND:
            output = func(*args, **kwargs)
            start = LEFT_OPERAND[operation]
            left, right = args[start : start + 2]
            self.recorder.add_product(output.numel() * left.shape[-1], (left, right), output.numel())
            return output
        if operation in FUSED_ATTENTION:
            q, k, v = args[:3]
            batch, heads, queries, head_dim = q.shape
            macs = attention_macs(batch, heads, queries, k.shape[2], head_dim, v.shape[3])
            self.recorder.add_product(macs, (q, k, v), batch * heads * queries * v.shape[3])
            return func(*args, **kwargs)
        with self:  # under inference_mode matmul, linear, ... arrive whole: take them apart and look at the pieces
            output = func.decompose(*args, **kwargs)
        return func(*args, **kwargs) if output is NotImplemented else output
