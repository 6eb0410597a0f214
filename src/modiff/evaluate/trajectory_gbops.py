"""Bit-operations of one image, from first step to last."""

from __future__ import annotations

from modiff.config import LayerConfig
from modiff.evaluate.cost import ModelCost
from modiff.model.report import Report


def trajectory_gbops(cost: ModelCost, report: Report | None, steps: int) -> float:
    """Sum over layers and steps of MACs x weight bits x activation bits, in units of 10^9.

    Layers that were left, and the products inside attention, count 32 x 32 bits. A modulated layer's first step counts
    at the bits it runs with: 32 where it anchors in full precision, rounds x bits if coded; so does re-anchoring.

    Args:
        cost: of one step of one image.
        report: what `apply` took; None for the full-precision model.
    """
    taken = {} if report is None else {entry.name: entry.config for entry in report.taken}
    total = 0
    for layer in cost.layers:
        config = taken.get(layer.name)
        if config is None:
            total += steps * layer.bops(None, None)
            continue
        weight, activation = config.weight.bits, config.activation.bits
        starts = _starts(config, steps)
        total += starts * layer.bops(weight, _first_bits(config))
        total += (steps - starts) * layer.bops(weight, activation)
    return total / 1e9


def _starts(config: LayerConfig, steps: int) -> int:
    """How often the states start in a trajectory."""
    if config.modulation is None:
        return 0
    every = config.modulation.reanchor_every
    return -(-steps // every) if every else 1


def _first_bits(config: LayerConfig) -> int | None:
    """Activation bits of a step that starts the states; None is full precision."""
    bits, modulation = config.activation.bits, config.modulation
    if modulation is None or bits is None or modulation.first_step == "full_precision":
        return None
    return min(32, modulation.rounds * bits)
