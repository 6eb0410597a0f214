"""What a layer, a step and a trajectory cost: MACs, bit-operations, elements of weights and of states.

MACs    multiply-accumulates of linear layers, convolutions and attention products, for the whole batch;
        padding and masked positions included. Norms, activations, additions and biases are not counted.
BOPs    MACs x weight bits x activation bits. A measure of work on paper, not of speed.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from modiff.config import ModulationConfig, check
from modiff.model.report import Report
from modiff.model.select import CANDIDATES
from modiff.nn.adapters import modules_of

FULL_PRECISION_BITS = 32


@dataclass(kw_only=True)
class LayerCost:
    """The work of the module `name` in one step, whole batch, over all of its calls.

    Linear and convolution layers count the elements of their weight, inputs and outputs. Any other module stands for
    the matrix products that it runs itself, such as those of attention; it has 0 elements.
    """

    name: str
    macs: int = 0
    weight_elements: int = 0
    input_elements: int = 0
    output_elements: int = 0

    def bops(self, weight_bits: int | None, activation_bits: int | None) -> int:
        """Bit-operations of one step: MACs x weight bits x activation bits; None is 32 bits, 0 is a skipped layer."""
        weight, activation = (FULL_PRECISION_BITS if bits is None else bits for bits in (weight_bits, activation_bits))
        return self.macs * weight * activation


def measure_cost(model: nn.Module, forward: Callable[[], object]) -> list[LayerCost]:
    """Run `forward()` once, without gradients, and count what `model` does in it, in the order of the first calls.

    forward: one denoising step, such as `lambda: unet(x, t)`. Works on the meta device too, where it costs no time.
    Every product is charged to the innermost module that runs it; a module with two names goes by its first.
    Raises: ConfigError if forward() does not call the model; what forward() raises. The hooks are gone either way.
    """
    counter = _Counter()
    with ExitStack() as hooks:
        for name, module in modules_of(model).items():
            hooks.callback(module.register_forward_pre_hook(partial(counter.enter, name), prepend=True).remove)
            hooks.callback(module.register_forward_hook(counter.leave, with_kwargs=True, always_call=True).remove)
        # nn.MultiheadAttention's fast path is one operation that hides its products
        hooks.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        hooks.enter_context(torch.no_grad())
        hooks.enter_context(counter)
        forward()
    why = "forward() may run a copy of it. Pass the module that it runs."
    check("measure_cost", "no call", bool(counter.costs), "forward() to call the model", why)
    return [cost for cost in counter.costs.values() if cost.macs]


def _fused(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> int:
    return 2 * q.shape[:3].numel() * k.shape[2] * (q.shape[3] + v.shape[3])


aten = torch.ops.aten
_FLOPS: dict[object, Callable[..., int]] = {
    **flop_registry,
    aten._int_mm: flop_registry[aten.mm],
    aten.mv: lambda matrix, *_, **__: 2 * matrix.numel(),
    aten.dot: lambda vector, *_, **__: 2 * vector.numel(),
    aten.addmv: lambda _, matrix, *__, **___: 2 * matrix.numel(),
    aten._scaled_dot_product_flash_attention_for_cpu: _fused,
    aten._scaled_dot_product_fused_attention_overrideable: _fused,
}
"""Operations of each product, two per MAC: torch's own formulas, and those that it has none for."""


class _Counter(TorchDispatchMode):
    """Sees each operation that torch executes, and knows which modules are running."""

    def __init__(self) -> None:
        super().__init__()
        self.costs: dict[str, LayerCost] = {}
        self.running: list[LayerCost] = []

    def enter(self, name: str, module: nn.Module, args: object) -> None:
        """Before the module runs."""
        self.running.append(self.costs.setdefault(name, LayerCost(name=name)))

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """After the module; `output` is None if it raised."""
        cost = self.running.pop()
        if isinstance(module, CANDIDATES) and isinstance(output, Tensor):
            cost.weight_elements = module.weight.numel()
            cost.input_elements += next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)).numel()
            cost.output_elements += output.numel()

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        kwargs = kwargs or {}
        flops = _FLOPS.get(func.overloadpacket)
        if flops is None:
            with self:  # under inference_mode matmul, linear, ... arrive whole: take them apart and look at the pieces
                output = func.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        output = func(*args, **kwargs)
        if flops is not None and self.running:
            self.running[-1].macs += flops(*args, **kwargs, out_val=output) // 2
        return output


def trajectory_gbops(costs: Sequence[LayerCost], report: Report | None, steps: int) -> float:
    """Sum over layers and steps of MACs x weight bits x activation bits of one image, in units of 10^9.

    Layers that were left, and the products inside attention, count 32 x 32 bits. A step at which a modulated layer
    anchors counts at the bits it runs with: inputs at 32, or rounds x bits if coded; weights at 32 if they are exact.
    Layers that anchor staggered do so 1 + (steps - 1) / reanchor_every times on average.
    costs: of one step of one image. report: what `apply` took; None for the full-precision model.
    """
    configs = {} if report is None else {entry.name: entry.config for entry in report.taken}
    total = 0.0
    for layer in costs:
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
