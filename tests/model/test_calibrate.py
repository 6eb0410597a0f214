"""Calibration watches what each layer will code: residuals of modulated layers, inputs of plain ones."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import modiff
from modiff import (
    CalibrationError,
    ConfigError,
    LayerConfig,
    ModiffConfig,
    QuantizerConfig,
    WeightConfig,
    presets,
)
from modiff.model.attach import attachment_of
from tests.helpers import assert_same_bits, drifting
from tests.model.toys import activations_only, sample, toy
from tests.recipes import recipe_of_layer
from tests.reference.recursion import run


def static(bits: int = 4, **settings) -> ModiffConfig:
    return activations_only(bits, dynamic=False, **settings)


def one_layer(config: ModiffConfig) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16))
    modiff.apply(model, dataclasses.replace(config, first_last="quantize"))
    return model


def loop(model: nn.Module, inputs: list[torch.Tensor]):
    def run_it() -> None:
        with modiff.trajectory(model), torch.no_grad():
            for x in inputs:
                model(x)

    return run_it


def scale_of(model: nn.Module, name: str = "0") -> float:
    return float(attachment_of(model).layers[name].quantizer.static[0].scale)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_scale_is_that_of_the_residuals_and_not_of_the_activations(bits):
    inputs = drifting(0, (4, 16), 20, 0.02, torch.float32)
    model = one_layer(static(bits))
    modiff.calibrate(model, loop(model, inputs))
    dynamic = LayerConfig(weight=WeightConfig(bits=None), activation=QuantizerConfig(bits=bits, granularity="tensor"))
    steps = run(inputs, recipe_of_layer(nn.Linear(16, 16), dynamic))
    largest = max(float(step.residual.abs().max()) for step in steps[1:])
    assert scale_of(model) == pytest.approx(largest / (2 ** (bits - 1) - 1), rel=1e-5)
    assert largest < 0.25 * float(torch.stack(inputs).abs().max()), "the two must differ, else nothing is tested"


def test_a_calibrated_model_follows_its_network_and_repeats_itself():
    model, exact = toy(), sample(toy(), steps=8)
    modiff.apply(model, static(8))

    def trajectory() -> list[torch.Tensor]:
        with modiff.trajectory(model):
            return sample(model, steps=8)

    with pytest.raises(CalibrationError, match="expected measured scales, got none"):
        trajectory()
    modiff.calibrate(model, trajectory)
    first, second = trajectory(), trajectory()
    for a, b, e in zip(first, second, exact, strict=True):
        assert_same_bits(b, a)
        assert float((a - e).norm() / e.norm()) < 0.01


@pytest.mark.parametrize("observer", ["minmax", "moving_average", "percentile", "mse", "l1", "cosine"])
def test_every_observer_can_be_asked_for(observer):
    inputs = drifting(0, (64, 16), 20, 0.05, torch.float32)
    model = one_layer(static(3))
    modiff.calibrate(model, loop(model, inputs), observer=observer)
    scales = {observer: scale_of(model)}
    modiff.calibrate(model, loop(model, inputs))
    scales["minmax"] = scale_of(model)
    if observer != "minmax":
        assert scales[observer] < scales["minmax"]


def test_input_channels_get_a_scale_each():
    model = one_layer(static(4, granularity="input_channel"))
    inputs = [x * torch.logspace(-2, 2, 16) for x in drifting(0, (8, 16), 5, 0.1, torch.float32)]
    modiff.calibrate(model, loop(model, inputs))
    scales = attachment_of(model).layers["0"].quantizer.static[0].scale.flatten()
    assert scales.shape == (16,)
    assert float(scales[-1] / scales[0]) > 1000


def test_a_loop_that_raises_keeps_the_scales_measured_before():
    inputs = drifting(0, (4, 16), 5, 0.1, torch.float32)
    model = one_layer(static(4))
    modiff.calibrate(model, loop(model, inputs))
    before = scale_of(model)

    def interrupted() -> None:
        loop(model, [10 * x for x in inputs])()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        modiff.calibrate(model, interrupted)
    assert scale_of(model) == before
    assert attachment_of(model).layers["0"].quantizer.watching is False
    loop(model, inputs)()


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ConfigError, match=r"observer: expected one of minmax, .*, cosine, kl, got 'max'"):
        modiff.calibrate(one_layer(static(4)), lambda: None, observer="max")
    with pytest.raises(CalibrationError, match="calibrate: expected layers with static scales, got none"):
        modiff.calibrate(one_layer(presets.w8a4()), lambda: None)


def test_a_layer_that_never_reached_a_coded_step_is_an_error():
    """Scales observed at the first step alone never see a residual."""
    model = one_layer(static(4))
    with pytest.raises(CalibrationError, match="0: expected inputs while calibrating, got none"):
        modiff.calibrate(model, loop(model, drifting(0, (4, 16), 1, 0.1, torch.float32)))
    assert attachment_of(model).layers["0"].quantizer.watching is False
