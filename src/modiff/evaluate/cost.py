"""What a layer, a step and a trajectory cost: MACs, bit-operations, bytes of weights and of states.

    MACs    multiply-accumulates of linear layers, convolutions and attention products, for the whole batch;
            padding and masked positions included. Norms, activations, additions and biases are not counted.
    BOPs    MACs x weight bits x activation bits. A measure of work on paper, not of speed.

The 35.7M-parameter CIFAR-10 DDPM U-Net, batch 1: convolutions and linear layers 6.054 GMAC, attention products 0.168.
The paper's 1636 GBOPs at W8A32 are 1636 / (8 x 32) = 6.39 GMAC. It does not say how it counted, but
6.054 + 2 x 0.168 = 6.390 meets the figure within its rounding: attention at two operations per MAC, all else at one,
and billed at the bits of the layers although it runs in full precision. Attention counted once gives 6.222 GMAC, or
1593 GBOPs. The paper also leaves out that the first step runs in full precision; `trajectory_gbops` does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from modiff.config import ModulationConfig
from modiff.errors import ConfigError
from modiff.model.report import Report

WorkKind = Literal["linear", "conv", "transposed_conv", "attention"]

FULL_PRECISION_BITS = 32


def attention_macs(batch: int, heads: int, queries: int, keys: int, head_dim: int, value_dim: int) -> int:
    """MACs of both attention products, Q K^T and softmax V. Softmax is not counted, masked positions are.

    >>> attention_macs(1, 1, 256, 256, 256, 256)
    33554432
    """
    return batch * heads * queries * keys * (head_dim + value_dim)


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """One layer's work in one step, whole batch: sums over its `calls` calls.

    kind "attention": all matrix products that the module `name` runs outside of linear and convolution layers, whether
    of two activations or with a bare parameter. Its `calls` are products (a fused attention is one), its elements
    are operands and results; it has no weights and keeps no states.
    """

    name: str
    kind: WorkKind
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

    def weight_bytes(self, bits: int | None) -> int:
        """Bytes of the weight codes packed tightly, rounded up; None is float32. Scales and biases are not counted."""
        return -(-self.weight_elements * _width(bits) // 8)


def _width(bits: int | None) -> int:
    """Bits as a number; None is full precision."""
    if bits is None:
        return FULL_PRECISION_BITS
    if not 0 <= bits <= FULL_PRECISION_BITS:
        raise ConfigError(f"bits: expected None or 0 to 32, got {bits}. None is full precision. Use one of these.")
    return bits


@dataclass(frozen=True)
class ModelCost:
    """The costs of a model's layers in the order of their first call."""

    layers: tuple[LayerCost, ...]

    @property
    def macs(self) -> int:
        """MACs of one step."""
        return sum(layer.macs for layer in self.layers)

    def weight_bytes(self, bits_of: Callable[[str], int | None]) -> int:
        """Bytes of all weight codes, with a layer's name to its weight bits."""
        return sum(layer.weight_bytes(bits_of(layer.name)) for layer in self.layers)


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
            hooks.callback(module.register_forward_pre_hook(partial(recorder.enter, name), prepend=True).remove)
            leave = partial(recorder.leave, name)
            hooks.callback(module.register_forward_hook(leave, with_kwargs=True, always_call=True).remove)
        # nn.MultiheadAttention's fast path is one operation that hides its products
        hooks.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        hooks.enter_context(torch.no_grad())
        hooks.enter_context(_ProductMode(recorder))
        forward()
    if not recorder.called:
        raise ConfigError(
            "measure_cost: expected forward() to call the model, got no call. It may run a copy of it. "
            "Pass the module that forward() runs."
        )
    return ModelCost(tuple(recorder.costs.values()))


CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONV = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, *CONV, *TRANSPOSED_CONV)


def _layer_cost(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> LayerCost:
    """The cost of one call of a linear or convolution layer with input x and output y.

    Each input element of a linear or transposed convolution meets the weights of its channel, cropped or not; each
    output element of a convolution sums over those of its channel, padding included.
    """
    if isinstance(layer, nn.Linear):
        kind, weights = "linear", layer.in_features * layer.out_features
        macs = x.numel() * layer.out_features
    else:
        conv = cast("nn.Conv2d", layer)  # all six share these attributes
        weights = conv.in_channels * conv.out_channels // conv.groups * prod(conv.kernel_size)
        if isinstance(layer, TRANSPOSED_CONV):
            kind, macs = "transposed_conv", x.numel() * weights // conv.in_channels
        else:
            kind, macs = "conv", y.numel() * weights // conv.out_channels
    return LayerCost(name=name, kind=cast("WorkKind", kind), macs=macs, calls=1, weight_elements=weights,
                     input_elements=x.numel(), output_elements=y.numel())  # fmt: skip


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
            sums = ("macs", "calls", "input_elements", "output_elements")
            cost = replace(cost, **{field: getattr(past, field) + getattr(cost, field) for field in sums})
        self.costs[cost.name] = cost

    def enter(self, name: str, module: nn.Module, args: object) -> None:
        """Before the module runs."""
        self.called = True
        self.running.append((name, isinstance(module, LAYERS)))

    def leave(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """After the module; `output` is None if it raised."""
        self.running.pop()
        if isinstance(module, LAYERS) and isinstance(output, Tensor) and not self.inside_layer:
            x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            self.add(_layer_cost(name, module, x, output))

    def add_product(self, macs: int, operands: Sequence[Tensor], output_elements: int) -> None:
        """A matrix product, charged to the innermost running module; outside the model it is not counted."""
        if self.running and not self.inside_layer:
            elements = sum(operand.numel() for operand in operands)
            self.add(LayerCost(name=self.running[-1][0], kind="attention", macs=macs, calls=1, weight_elements=0,
                               input_elements=elements, output_elements=output_elements))  # fmt: skip


aten = torch.ops.aten
LEFT_OPERAND: dict[object, int] = {
    **dict.fromkeys((aten.mm, aten.bmm, aten.mv, aten.dot, aten._int_mm), 0),
    **dict.fromkeys((aten.addmm, aten.baddbmm, aten.addmv), 1),
}
"""Where the left one of the two factors is among the arguments; the right one follows it."""

FUSED_ATTENTION: frozenset[object] = frozenset(
    getattr(aten, f"_scaled_dot_product_{name}")
    for name in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention",
                 "fused_attention_overrideable")
)  # fmt: skip
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


def trajectory_gbops(cost: ModelCost, report: Report | None, steps: int) -> float:
    """Sum over layers and steps of MACs x weight bits x activation bits of one image, in units of 10^9.

    Layers that were left, and the products inside attention, count 32 x 32 bits. A step at which a modulated layer
    anchors counts at the bits it runs with: inputs at 32, or rounds x bits if coded; weights at 32 if they are exact.
    Layers that anchor staggered do so 1 + (steps - 1) / reanchor_every times on average.

    Args:
        cost: of one step of one image.
        report: what `apply` took; None for the full-precision model.
    """
    configs = {} if report is None else {entry.name: entry.config for entry in report.taken}
    total = 0.0
    for layer in cost.layers:
        config = configs.get(layer.name)
        if config is None:
            total += steps * layer.bops(None, None)
            continue
        weight, bits, modulation = config.weight.bits, config.activation.bits, config.modulation
        anchors, anchor_bops = 0.0, 0
        if modulation is not None and bits is not None:
            anchors = _anchors(modulation, steps)
            coded, exact = modulation.first_step == "coded", modulation.anchor_weights == "exact"
            inputs = min(FULL_PRECISION_BITS, modulation.rounds * bits) if coded else None
            anchor_bops = layer.bops(None if exact and not coded else weight, inputs)
        total += anchors * anchor_bops + (steps - anchors) * layer.bops(weight, bits)
    return total / 1e9


def _anchors(modulation: ModulationConfig, steps: int) -> float:
    """How often a layer anchors in a trajectory, the average over the layers."""
    every = modulation.reanchor_every
    if not every:
        return 1
    return 1 + (steps - 1) / every if modulation.stagger else -(-steps // every)
