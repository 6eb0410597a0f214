"""An interrupted reconstruction goes on after the last finished unit, and only where it belongs."""

import dataclasses

import pytest
import torch

import modiff
from modiff import ConfigError, FormatError, WeightConfig, presets
from modiff.calibration.data import CalibrationSet
from modiff.calibration.reconstruct import job as reconstruct_job
from tests.calibration.learning import (
    QUICK,
    STEPS,
    applied,
    codes_of,
    layers_of,
    learn,
    static_config,
    weights,
    widened,
)
from tests.model.toys import toy

LEARN = reconstruct_job.ReconstructionJob.learn


@pytest.fixture
def begun(monkeypatch) -> list[str]:
    """The units begun; a unit named "kill" in it interrupts the one after."""
    units: list[str] = []

    def learn(self, block, index):
        if units[-2:-1] == ["kill"]:
            raise KeyboardInterrupt
        units.append(block.name)
        return LEARN(self, block, index)

    monkeypatch.setattr(reconstruct_job.ReconstructionJob, "learn", learn)
    return units


def state_of(model) -> list[torch.Tensor]:
    """Codes of the weights, and static scales."""
    codes = [c for each in codes_of(model).values() for c in each]
    return codes + [
        q.scale for layer in layers_of(model).values() for q in (layer.quantizer and layer.quantizer.static) or ()
    ]


@pytest.mark.parametrize("kind", ["weights", "weights again", "modulated weights", "scales"])
def test_a_killed_run_is_undone_goes_on_and_ends_where_an_uninterrupted_one_ends(tmp_path, begun, kind):
    def prepared():
        model, calls = applied(
            toy, {"scales": static_config(), "modulated weights": presets.modulated(3, 8)}.get(kind, weights())
        )
        if kind == "scales":
            widened(model, calls, 3.0)
        elif kind == "weights again":
            learn(model, calls, seed=5)
        return model, calls

    config = STEPS if kind == "scales" else QUICK
    model, calls = prepared()
    whole = learn(model, calls, config)
    expected = state_of(model)
    model, calls = prepared()
    before = state_of(model)
    begun.append("kill")
    with pytest.raises(KeyboardInterrupt):
        learn(model, calls, config, folder=tmp_path)
    assert len(list(tmp_path.glob("unit-*"))) == 1
    assert all(map(torch.equal, state_of(model), before))
    assert any(q.quantized_weight.fixed for q in layers_of(model).values()) == (kind == "weights again")
    begun.clear()
    model, calls = prepared()  # another process: nothing but the folder is left
    begun.clear()
    resumed = learn(model, calls, config, folder=tmp_path)
    assert begun == [u.name for u in whole.units[1:]]
    assert resumed == whole
    assert all(map(torch.equal, state_of(model), expected))


@pytest.mark.parametrize("change", ["config", "bits", "calls", "weights", "scales"])
def test_a_folder_of_another_reconstruction_and_a_damaged_one_are_refused(tmp_path, change):
    config, applies = QUICK, weights()
    if change == "scales":
        config = dataclasses.replace(QUICK, activations="quantized")
        applies = static_config()
        applies = dataclasses.replace(applies, layer=dataclasses.replace(applies.layer, weight=WeightConfig(bits=3)))
    model, calls = applied(toy, applies)
    if change == "scales":
        widened(model, calls, 3.0)
    learn(model, calls, config, folder=tmp_path)
    other, kept = config, calls
    if change == "config":
        other = dataclasses.replace(QUICK, seed=7)
    elif change == "bits":
        modiff.remove(model)
        modiff.apply(model, weights(bits=2))
    elif change == "calls":
        kept = CalibrationSet(list(calls)[1:])
    elif change == "scales":
        widened(model, calls, 2.0)
    else:
        with torch.no_grad():
            model.conv_in.weight.mul_(1.5)
    with pytest.raises(ConfigError, match="expected a folder of the same job, got one with another "):
        learn(model, kept, other, folder=tmp_path)
    if change == "config":
        path = min(tmp_path.glob("unit-*"))
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(FormatError, match=f"{path.name}: expected a unit of a reconstruction, got SafetensorError"):
            learn(model, calls, config, folder=tmp_path)
