"""Scales per step and per group of steps: measured where they will be used, and refused anywhere else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import modiff
from modiff import CalibrationError, LayerConfig, ModiffConfig, ModulationConfig, QuantizerConfig, WeightConfig
from modiff.core.observers import MSEObserver
from modiff.model.attach import attachment_of
from tests.helpers import assert_same_bits, assert_within


class Timed(nn.Module):
    """One layer whose input grows as time runs down."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, sample: torch.Tensor, timestep: float | torch.Tensor) -> torch.Tensor:
        return self.layer(sample)


def config(modulated: bool, **settings) -> ModiffConfig:
    layer = LayerConfig(
        weight=WeightConfig(bits=None),
        activation=QuantizerConfig(bits=4, dynamic=False, **settings),
        modulation=ModulationConfig() if modulated else None,
    )
    return ModiffConfig(layer=layer, first_last="quantize")


def timed(modulated: bool, **settings) -> nn.Module:
    torch.manual_seed(0)
    model = Timed()
    modiff.apply(model, config(modulated, **settings))
    return model


TIMES = [900.0, 700.0, 400.0, 0.0]
INPUTS = [torch.randn(4, 16, generator=torch.Generator().manual_seed(i)) * (i + 1) for i in range(4)]


def play(model: nn.Module, times: list[float] = TIMES, inputs: list[torch.Tensor] = INPUTS) -> list[torch.Tensor]:
    with torch.no_grad(), modiff.trajectory(model):
        return [model(x, t) for x, t in zip(inputs, times, strict=True)]


def coder_of(model: nn.Module):
    return attachment_of(model).layers["layer"].quantizer


@pytest.mark.parametrize(("step_groups", "groups"), [(0, [[0], [1], [2], [3]]), (2, [[0, 1], [2, 3]]), (3, [[0, 1], [2], [3]])])  # fmt: skip # noqa: E501
def test_each_group_of_steps_has_the_scale_of_its_largest_input(step_groups, groups):
    model = timed(False, step_groups=step_groups)
    modiff.calibrate(model, lambda: play(model))
    quantizer = coder_of(model)
    assert quantizer.static is None
    assert [float(q.scale) for (q,) in quantizer.tables.values()] == pytest.approx(
        [max(float(INPUTS[i].abs().max()) for i in group) / 7 for group in groups], rel=1e-6
    )
    outputs = play(model)
    for i, x in enumerate(INPUTS):
        step = next(float(quantizer.tables[g][0].scale) for g, members in enumerate(groups) if i in members)
        exact = nn.functional.linear(torch.round(x / step) * step, model.layer.weight, model.layer.bias)
        assert_within(outputs[i], exact, 1e-4)


def test_residuals_are_kept_by_their_step_and_the_one_before():
    model = timed(True, step_groups=0)
    modiff.calibrate(model, lambda: play(model))
    quantizer = coder_of(model)
    assert sorted(quantizer.moments, reverse=True) == [(700.0, 900.0), (400.0, 700.0), (0.0, 400.0)]
    first, second = play(model), play(model)
    for a, b in zip(first, second, strict=True):
        assert_same_bits(b, a)


@pytest.mark.parametrize("modulated", [True, False])
def test_a_sampler_with_other_steps_is_an_error_and_not_the_nearest_scale(modulated):
    model = timed(modulated, step_groups=0)
    modiff.calibrate(model, lambda: play(model))
    with pytest.raises(CalibrationError, match=r"expected a step of the . calibrated ones, .* got timestep 600"):
        play(model, [900.0, 600.0, 400.0, 0.0])


def test_a_coarser_sampler_on_calibrated_steps_serves_values_but_not_residuals():
    """Every other step of 4: the inputs of a step are the same, its residual is that of a step twice as long."""
    plain, modulated = timed(False, step_groups=0), timed(True, step_groups=0)
    for model in (plain, modulated):
        modiff.calibrate(model, lambda model=model: play(model))
    half = ([900.0, 400.0], INPUTS[::2])
    assert len(play(plain, *half)) == 2
    with pytest.raises(CalibrationError, match="got timestep 400 after 900"):
        play(modulated, *half)


def test_plain_layers_find_their_step_also_outside_of_a_trajectory_and_for_a_whole_batch_of_timesteps():
    model = timed(False, step_groups=0)
    modiff.calibrate(model, lambda: play(model))
    expected = play(model)
    with torch.no_grad():
        assert_same_bits(model(INPUTS[1], torch.full((4,), 700.0)), expected[1])
        with pytest.raises(modiff.StateError, match="expected one timestep for the whole batch, got several"):
            model(INPUTS[1], torch.tensor([700.0, 400.0, 700.0, 700.0]))


def test_both_contexts_of_guidance_share_the_scales_of_a_step():
    model = timed(True, step_groups=0)

    def run() -> None:
        with torch.no_grad(), modiff.trajectory(model):
            for t, x in zip(TIMES, INPUTS, strict=True):
                for name, factor in (("cond", 1.0), ("uncond", 3.0)):
                    with modiff.context(model, name):
                        model(factor * x, t)

    modiff.calibrate(model, run)
    quantizer = coder_of(model)
    shared = float(quantizer.tables[quantizer.moments[(700.0, 900.0)]][0].scale)
    alone = timed(True, step_groups=0)
    modiff.calibrate(alone, lambda: play(alone))
    assert shared == pytest.approx(3 * float(coder_of(alone).tables[0][0].scale), rel=1e-5)


def test_an_observer_with_settings_of_its_own_can_be_given():
    x = torch.randn(2000, 16)
    x[0, 0] = 12.0
    scales = []
    for observer in ("mse", lambda axis: MSEObserver(axis, trials=1)):
        model = timed(False)
        modiff.calibrate(model, lambda model=model: play(model, [1.0], [x]), observer=observer)
        scales.append(float(coder_of(model).static[0].scale))
    assert scales[1] == pytest.approx(12 / 7, rel=1e-6)
    assert scales[0] < 0.8 * scales[1]
