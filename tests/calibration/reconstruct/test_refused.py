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
from modiff.calibration.reconstruct.config import ReconstructConfig
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


def refused(config: ModiffConfig, learn: ReconstructConfig, pairs: bool = True, build=toy):
    model, calls = applied(build, config, pairs=pairs)
    return lambda: learn_units(model, calls, learn, kinds=KINDS, progress=False)


def test_what_cannot_be_learned_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match=r"expected layers to learn, got none\. No weight is quantized"):
        refused(presets.plain(None, 8), QUICK)()
    with pytest.raises(
        ConfigError, match=r"got none\. Dynamic scales are measured at each call, and those of modulated"
    ):
        refused(presets.plain(4, 8), STEPS)()
    with pytest.raises(
        ConfigError, match=r"got none\. Dynamic scales are measured at each call, and those of modulated"
    ):
        refused(static_config(modulation=ModulationConfig()), STEPS)()
    with pytest.raises(
        ConfigError, match=r"got none\. Dynamic scales are measured at each call, and plain layers have"
    ):
        refused(static_config(), RESIDUAL)()
    with pytest.raises(ConfigError, match="body: expected predictor='hold' and one set of scales for all steps, got p"):
        refused(static_config(modulation=ModulationConfig(predictor="linear")), RESIDUAL)()
    with pytest.raises(CalibrationError, match="expected calls with the one before each, got none among 4"):
        refused(static_config(modulation=ModulationConfig()), RESIDUAL, pairs=False)()
    with pytest.raises(CalibrationError, match="body: expected measured scales, got none"):
        refused(static_config(), STEPS)()


def test_activations_that_cannot_be_coded_while_learning_are_refused():
    quantized = dataclasses.replace(QUICK, activations="quantized")
    with pytest.raises(ConfigError, match="body: expected 2 to 8 activation bits, got 0"):
        refused(presets.modulated(4, 0), quantized)()
    layer = LayerConfig(
        weight=WeightConfig(bits=4), activation=dataclasses.replace(STATIC, step_groups=0), modulation=None
    )
    with pytest.raises(ConfigError, match="body: expected one set of scales for all steps, got step_groups=0"):
        refused(ModiffConfig(layer=layer), quantized)()
    assert refused(ModiffConfig(layer=layer), QUICK)().learned
    assert refused(presets.modulated(4, 0), QUICK)().learned


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
