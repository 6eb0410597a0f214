"""An interrupted reconstruction goes on after the last finished unit, and only where it belongs."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import modiff
from modiff import ConfigError, FormatError, WeightConfig, presets
from modiff.calibration.data import CalibrationSet
from modiff.calibration.reconstruct import job as reconstruct_job
from modiff.calibration.reconstruct.run import learn_units
from tests.calibration.learning import (
    KINDS,
    QUICK,
    STEPS,
    applied,
    codes_of,
    layers_of,
    same_codes,
    static_config,
    weights,
    widened,
)
from tests.helpers import assert_same_bits
from tests.model.toys import toy


def killed_after(units: int):
    """A `learn` that is interrupted in the unit after this many, and a list of the units begun."""
    begun: list[str] = []
    learn = reconstruct_job.ReconstructionJob.learn

    def interrupted(self, block, index):
        begun.append(block.name)
        if len(begun) > units:
            raise KeyboardInterrupt
        return learn(self, block, index)

    return interrupted, begun


@pytest.mark.parametrize("config", [weights(), presets.modulated(3, 8)])
def test_a_killed_run_goes_on_and_ends_where_an_uninterrupted_one_ends(tmp_path, config):
    build, finished = toy, 1
    model, calls = applied(build, config)
    whole = learn_units(model, calls, QUICK, kinds=KINDS, progress=False)
    expected = codes_of(model)
    model, calls = applied(build, config)
    with pytest.MonkeyPatch.context() as patch:
        interrupted, _ = killed_after(finished)
        patch.setattr(reconstruct_job.ReconstructionJob, "learn", interrupted)
        with pytest.raises(KeyboardInterrupt):
            learn_units(model, calls, QUICK, kinds=KINDS, folder=tmp_path, progress=False)
    assert len(list(tmp_path.glob("unit-*"))) == finished
    model, calls = applied(build, config)  # another process: nothing but the folder is left
    with pytest.MonkeyPatch.context() as patch:
        counting, begun = killed_after(100)
        patch.setattr(reconstruct_job.ReconstructionJob, "learn", counting)
        resumed = learn_units(model, calls, QUICK, kinds=KINDS, folder=tmp_path, progress=False)
    assert begun == [u.name for u in whole.units[finished:]]
    assert resumed == whole
    assert same_codes(codes_of(model), expected)


@pytest.mark.parametrize("learned", [False, True])
def test_an_interrupted_run_leaves_the_codes_as_they_were(learned):
    model, calls = applied(toy, weights())
    if learned:
        learn_units(model, calls, dataclasses.replace(QUICK, seed=5), kinds=KINDS, progress=False)
    before = codes_of(model)
    fixed = {name: quantized.quantized_weight.fixed for name, quantized in layers_of(model).items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reconstruct_job.ReconstructionJob, "learn", killed_after(1)[0])
        with pytest.raises(KeyboardInterrupt):
            learn_units(model, calls, QUICK, kinds=KINDS, progress=False)
    assert same_codes(codes_of(model), before)
    assert {name: quantized.quantized_weight.fixed for name, quantized in layers_of(model).items()} == fixed


def test_interrupted_steps_are_as_they_were_and_go_on(tmp_path):
    learned = []
    for units in (100, 1):
        model, calls = applied(toy, static_config())
        start = widened(model, calls, 3.0)
        if units == 1:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(reconstruct_job.ReconstructionJob, "learn", killed_after(units)[0])
                with pytest.raises(KeyboardInterrupt):
                    learn_units(model, calls, STEPS, kinds=KINDS, folder=tmp_path, progress=False)
            assert all(layers_of(model)[name].quantizer.static is start[name] for name in start)
        learn_units(model, calls, STEPS, kinds=KINDS, folder=tmp_path if units == 1 else None, progress=False)
        learned.append(torch.cat([q.scale.flatten() for t in layers_of(model).values() for q in t.quantizer.static]))
    assert_same_bits(*learned)


def test_a_folder_learned_with_activations_of_other_scales_is_refused(tmp_path):
    config, static = dataclasses.replace(QUICK, activations="quantized"), static_config()
    static = dataclasses.replace(static, layer=dataclasses.replace(static.layer, weight=WeightConfig(bits=3)))
    for factor in (3.0, 2.0):
        model, calls = applied(toy, static)
        widened(model, calls, factor)
        if factor == 3.0:
            learn_units(model, calls, config, kinds=KINDS, folder=tmp_path, progress=False)
        else:
            with pytest.raises(ConfigError, match="expected a folder of the same job, got one with another "):
                learn_units(model, calls, config, kinds=KINDS, folder=tmp_path, progress=False)


@pytest.mark.parametrize("change", ["config", "bits", "calls", "weights"])
def test_a_folder_of_another_reconstruction_is_refused(tmp_path, change):
    model, calls = applied(toy, weights())
    learn_units(model, calls, QUICK, kinds=KINDS, folder=tmp_path, progress=False)
    config = QUICK
    if change == "config":
        config = dataclasses.replace(QUICK, seed=7)
    elif change == "bits":
        modiff.remove(model)
        modiff.apply(model, weights(bits=2))
    elif change == "calls":
        calls = CalibrationSet(list(calls)[1:])
    else:
        with torch.no_grad():
            model.conv_in.weight.mul_(1.5)
    with pytest.raises(ConfigError, match="expected a folder of the same job, got one with another "):
        learn_units(model, calls, config, kinds=KINDS, folder=tmp_path, progress=False)


def test_a_damaged_unit_is_refused_with_its_name(tmp_path):
    model, calls = applied(toy, weights())
    learn_units(model, calls, QUICK, kinds=KINDS, folder=tmp_path, progress=False)
    path = min(tmp_path.glob("unit-*"))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(FormatError, match=f"{path.name}: expected a unit of a reconstruction, got SafetensorError"):
        learn_units(model, calls, QUICK, kinds=KINDS, folder=tmp_path, progress=False)
