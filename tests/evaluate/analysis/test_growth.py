"""Error growth: both loops against an independent recursion, every error below its bound, the printed exponents."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from modiff import presets
from modiff.config import LayerConfig, ModulationConfig, QuantizerConfig
from modiff.core.affine import QParams
from modiff.core.quantizer import Code
from modiff.evaluate.analysis.growth import (
    ErrorGrowth,
    Growth,
    compensated_bound,
    printed_bound,
    scale_energy,
    uncompensated_bound,
)
from modiff.evaluate.analysis.watch import watch
from modiff.hosts.diffusers.runs import calibration_run
from tests.evaluate.analysis.networks import OneLayer, driven, only_layer
from tests.helpers import drifting
from tests.pixels import pixel_pipeline
from tests.recipes import recipe_of_layer
from tests.reference import recursion

SLACK = 1 + 1e-4  # the states are float32


def grown(layer: nn.Module, inputs: list[torch.Tensor], config: LayerConfig) -> Growth:
    network = OneLayer(layer)
    growth = ErrorGrowth()
    watch(network, driven(network, inputs), only_layer(config), [growth])
    return growth.growth()


@pytest.fixture(scope="module")
def unet() -> Growth:
    pipe = pixel_pipeline()
    growth = ErrorGrowth()
    watch(pipe, partial(calibration_run(pipe, steps=8, batch=2), 0), presets.w8a4(), [growth])
    return growth.growth()


def test_every_error_of_every_layer_is_below_its_bound(unet: Growth) -> None:
    assert len(unet["layers"]) >= 8
    for layer in unet["layers"]:
        assert 0 < layer["c"] < 1
        for mode in ("compensated", "uncompensated"):
            for error, bound in zip(layer[mode]["error"], layer[mode]["bound"], strict=True):
                assert 0 < error <= bound * SLACK
    assert unet["compensated"]["exceeded"] == 0
    assert unet["uncompensated"]["exceeded"] == 0


def test_both_loops_and_c_equal_an_independent_float64_recursion() -> None:
    layer = nn.Linear(8, 5)
    inputs = drifting(5, (2, 3, 8), 7, 0.3)
    config = LayerConfig(activation=QuantizerConfig(bits=3, clip=0.7), modulation=ModulationConfig(predictor="linear"))
    (growth,) = grown(layer.double(), inputs, config)["layers"]
    shares = []
    for mode, compensation in (("compensated", "closed_loop"), ("uncompensated", "none")):
        hold = LayerConfig(activation=config.activation, modulation=ModulationConfig(error_compensation=compensation))
        input_state = inputs[0]
        for i, step in enumerate(recursion.run(inputs, recipe_of_layer(layer, hold))[1:]):
            input_state = input_state + step.sent.value
            assert growth["moves"][i] == pytest.approx(float((inputs[i + 1] - inputs[i]).norm()))
            assert growth["norms"][i] == pytest.approx(float(inputs[i + 1].norm()))
            assert growth[mode]["error"][i] == pytest.approx(float((inputs[i + 1] - input_state).norm()), rel=1e-4)
            shares.append(float((step.residual - step.sent.value).square().sum() / step.residual.square().sum()))
    assert growth["c"] == pytest.approx(max(shares), rel=1e-4)


def test_a_rest_and_a_jump_break_the_printed_bound_of_a_real_layer_but_not_the_corrected_one() -> None:
    """With the printed exponents as the bound, `exceeded` would not be 0 here."""
    first, second, third = drifting(0, (1, 16, 8), 3, 0.999)
    jumped = 0.8 * first + 0.4 * third  # not so far that it would be coded from zero
    inputs = [first, first + 1e-3 * second, *[first + 1e-3 * second] * 12, jumped]
    growth = grown(nn.Linear(8, 5), [x.float() for x in inputs], LayerConfig(activation=QuantizerConfig(bits=4)))
    (layer,) = growth["layers"]
    assert layer["compensated"]["error"][-1] > 10 * layer["compensated"]["printed_bound"][-1]
    assert growth["compensated"]["exceeded"] == 0
    assert growth["compensated"]["printed_exceeded"] > 0


def test_scale_energy_counts_each_scale_for_the_elements_that_share_it() -> None:
    codes = torch.zeros(2, 3, 4, dtype=torch.int8)
    rows = Code(((codes, QParams(torch.tensor([1.0, 2.0]).reshape(2, 1, 1), None)),), 1)
    assert float(scale_energy((rows,))) == 12 * 1.0 + 12 * 4.0


SHARES = st.floats(0.001, 0.99)
MOVES = st.lists(st.floats(0, 1e3), min_size=1, max_size=12)


@given(SHARES, MOVES)
def test_the_bounds_are_the_sums_of_their_formulas(c: float, moves: list[float]) -> None:
    """With the paper's descending indices: step i is t = T - i, d_k is the move at T - k."""
    bounds = zip(
        uncompensated_bound(c, moves), compensated_bound(c, moves),
        printed_bound(c, moves, compensated=False), printed_bound(c, moves, compensated=True), strict=True,
    )  # fmt: skip
    big_t = len(moves) + 1
    for step, values in enumerate(bounds, 1):
        t = big_t - step
        move = {k: moves[big_t - k - 1] for k in range(t, big_t)}.items()
        expected = (
            math.sqrt(c) * sum(d for _, d in move),
            sum(c ** ((k - t + 1) / 2) * d for k, d in move),
            math.sqrt(sum(2 ** (big_t - k - 1) * c * d**2 for k, d in move)),
            math.sqrt(sum((2 * c) ** (big_t - k - 1) * d**2 for k, d in move)),
        )
        assert values == pytest.approx(expected, rel=1e-9, abs=1e-9)
