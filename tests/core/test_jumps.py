"""Samples that leave their anchor behind: where the rounding error of the weight acts on more than the value."""

import pytest
import torch
from torch import Tensor

from modiff import ModulationConfig, QuantizerConfig
from modiff.core.jumps import Anchor, thinned
from modiff.core.quantizer import Quantizer
from modiff.core.recursion import State, accumulate, encode
from tests.core.loop import BIAS, WEIGHT, Affine
from tests.helpers import assert_within, drifting

DOUBLE, ROUNDED = ModulationConfig(state_dtype="float64"), Affine(WEIGHT.round(decimals=1))
ROUNDED.anchor = Affine().anchor  # exact weights meet the anchor
NOISE = float((WEIGHT - ROUNDED.weight).square().sum() / WEIGHT.square().sum())


def test_the_excess_is_what_the_distance_costs_more_than_the_value_at_some_positions() -> None:
    assert thinned(torch.arange(48.0).reshape(1, 1, 8, 6), 1).flatten().tolist()[:4] == [0, 2, 4, 12]
    a, x = drifting(1, (2, 3, 8), 2, 1.0)
    anchor, runs = Anchor(a.split([3, 5], -1), -1), x.split([3, 5], -1)
    anchor.noise = 0.25
    power = [(v - v.mean(1, keepdim=True)).square().mean((1, 2), keepdim=True) for v in (x - a, x)]
    assert_within(anchor.excess(runs, torch.ones(2, 1, 1), due=True), 3 * (power[0] - power[1]), 1e-12)


def walk(angle: float, noise: float) -> list[tuple[Tensor, Tensor, list[bool] | None]]:
    """(x, output, flags) of each step; the second sample turns away by an angle a step, the first hardly moves."""
    first = torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first -= first.mean(1, keepdim=True)
    other = first.flip(1).roll(1, -1)
    other -= (other * first).mean((1, 2), keepdim=True) / first.square().mean((1, 2), keepdim=True) * first
    quantizer, o = Quantizer(QuantizerConfig(bits=8), "sample", -1, (8,)), State(ROUNDED.anchor(first))
    steps, a, anchor = [], None, Anchor([first], -1)
    anchor.noise = noise
    for step in range(9):
        turn = torch.tensor([0.06, angle], dtype=torch.float64).deg2rad().reshape(2, 1, 1) * step
        x = first * turn.cos() + other * turn.sin()
        update, a = encode(x, a, quantizer, DOUBLE, anchor=anchor)
        o = accumulate(update, o, ROUNDED, DOUBLE)
        steps.append((x, o.value, None if update.intra is None else update.intra.flatten().tolist()))
    return steps


@pytest.mark.parametrize(("angle", "leaves"), [(31.0, 2), (16.0, 4), (8.0, 8), (7.0, None)])
def test_a_sample_starts_from_zero_once_it_is_further_from_its_anchor_than_from_zero(angle, leaves) -> None:
    """cos < 1/2: more than 60 degrees, looked at after 1, 2, 4 and 8 steps; the other sample stays."""
    steps = walk(angle, NOISE)
    assert [flags for *_, flags in steps] == [[False, True] if step == leaves else None for step in range(9)]
    for step, (x, output, _) in enumerate(steps):
        anchors = steps[0][0].clone()
        anchors[1] *= leaves is None or step < leaves
        law = x @ ROUNDED.weight.T + anchors @ (WEIGHT - ROUNDED.weight).T + BIAS
        assert_within(output, law, 0.05)  # but for the rounding of the activation
    assert all(flags is None for *_, flags in walk(angle, 0.0))  # a weight that lost nothing
