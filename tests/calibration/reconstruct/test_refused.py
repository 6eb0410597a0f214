"""What cannot be learned is refused, with the reason and what to do instead."""

from __future__ import annotations

import dataclasses

import pytest

import modiff
from modiff import (
    CalibrationError,
    ConfigError,
    LayerConfig,
    ModiffConfig,
    ModulationConfig,
    StateError,
    WeightConfig,
    presets,
)
from modiff.calibration.data import CalibrationSet
from modiff.calibration.reconstruct.run import learn_units
from tests.calibration.learning import (
    KINDS,
    QUICK,
    RESIDUAL,
    STATIC,
    STEPS,
    applied,
    layers_of,
    static_config,
    weights,
)
from tests.model.toys import toy

DYNAMIC = r"got none\. Dynamic scales are measured at each call, and "
MODULATED = static_config(modulation=ModulationConfig())
LINEAR = static_config(modulation=ModulationConfig(predictor="linear"))
QUANTIZED = dataclasses.replace(QUICK, activations="quantized")
STEPWISE = ModiffConfig(
    layer=LayerConfig(
        weight=WeightConfig(bits=4), activation=dataclasses.replace(STATIC, step_groups=0), modulation=None
    )
)


@pytest.mark.parametrize(
    ("config", "learn", "error", "message"),
    [
        (presets.plain(None, 8), QUICK, ConfigError, r"expected layers to learn, got none\. No weight is quantized"),
        (presets.plain(4, 8), STEPS, ConfigError, DYNAMIC + "those of modulated"),
        (MODULATED, STEPS, ConfigError, DYNAMIC + "those of modulated"),
        (static_config(), RESIDUAL, ConfigError, DYNAMIC + "plain layers have"),
        (LINEAR, RESIDUAL, ConfigError, "body: expected predictor='hold' and one set of scales for all steps, got p"),
        (MODULATED, RESIDUAL, CalibrationError, "expected calls with the one before each, got none among 4"),
        (static_config(), STEPS, CalibrationError, "body: expected measured scales, got none"),
        (presets.modulated(4, 0), QUANTIZED, ConfigError, "body: expected 2 to 8 activation bits, got 0"),
        (STEPWISE, QUANTIZED, ConfigError, "body: expected one set of scales for all steps, got step_groups=0"),
    ],
)
def test_what_cannot_be_learned_is_refused_with_the_reason(config, learn, error, message):
    model, calls = applied(toy, config, pairs=error is ConfigError)
    with pytest.raises(error, match=message):
        learn_units(model, calls, learn, kinds=KINDS, progress=False)
    if learn is QUANTIZED:
        assert learn_units(model, calls, QUICK, kinds=KINDS, progress=False).learned


def test_a_plain_model_no_calls_and_a_running_trajectory_are_refused():
    model, calls = applied(toy, weights())
    with pytest.raises(StateError, match="reconstruct: expected a model with modulated layers, got a plain Toy"):
        learn_units(toy(), calls, QUICK, progress=False)
    with pytest.raises(CalibrationError, match="reconstruct: expected at least one calibration call, got none"):
        learn_units(model, CalibrationSet([]), QUICK, progress=False)
    with (
        modiff.trajectory(model),
        pytest.raises(StateError, match="reconstruct: expected no running trajectory, got one"),
    ):
        learn_units(model, calls, QUICK, progress=False)
    layers_of(model)["body"].pack()
    with pytest.raises(StateError, match="body: expected a weight with its floats, got a packed one"):
        learn_units(model, calls, QUICK, progress=False)
