"""Static scales of residuals know how large the steps were that they were measured with."""

from __future__ import annotations

import warnings

import pytest
import torch

import modiff
from modiff import ModiffWarning
from modiff.model.attach import attachment_of
from tests.model.toys import activations_only, sample, toy

STATIC = activations_only(8, dynamic=False)
MESSAGE = "expected steps of at most 100 timesteps, as its static scales were measured with, got one of 166.667"


def calibrated(config=STATIC, steps: int = 10):
    model = toy()
    modiff.apply(model, config)
    with torch.no_grad():
        modiff.calibrate(model, lambda: run(model, steps))
    return model


def run(model, steps: int) -> None:
    with modiff.trajectory(model):
        sample(model, steps)


def test_a_step_that_is_much_larger_than_the_calibrated_ones_warns_once():
    model = calibrated()
    run(model, 10)
    run(model, 7)  # 143 timesteps: slightly fewer steps are as good
    with pytest.warns(ModiffWarning, match=MESSAGE):
        run(model, 6)
    run(model, 6)


def test_scales_that_are_dynamic_of_values_or_of_each_step_have_no_step_size():
    for config in (activations_only(8), modiff.presets.plain(8, 8), activations_only(8, dynamic=False, step_groups=0)):
        model = toy()
        modiff.apply(model, config)
        if not config.layer.activation.dynamic:
            modiff.calibrate(model, lambda model=model: run(model, 10))
        assert attachment_of(model).step_sizes.largest is None


def test_measuring_again_forgets_the_step_size_and_a_failed_measurement_keeps_it():
    model = calibrated()
    modiff.calibrate(model, lambda: run(model, 4))
    assert attachment_of(model).step_sizes.largest == 250
    with pytest.raises(modiff.CalibrationError):
        modiff.calibrate(model, lambda: None)
    assert attachment_of(model).step_sizes.largest == 250
    run(model, 3)


@pytest.mark.parametrize("learned", [False, True])
def test_pairs_of_steps_say_how_large_a_step_is(learned):
    model = toy()
    calls = modiff.collect(model, lambda i: sample(model, 10, batch=4), pairs=True, progress=False)
    modiff.apply(model, activations_only(8, dynamic=False))
    if learned:
        config = modiff.ReconstructConfig(learn="residual_scales", unit="layer", iterations=1, checks=1)
        modiff.reconstruct(model, calls, config, progress=False)
    else:
        modiff.calibrate(model, lambda: modiff.replay(model, calls))
    with pytest.warns(ModiffWarning, match=MESSAGE):
        run(model, 6)


def test_a_network_without_a_timestep_is_not_checked():
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 32), torch.nn.Linear(32, 32))
    modiff.apply(model, activations_only(8, dynamic=False))

    def loop() -> None:
        with modiff.trajectory(model), torch.no_grad():
            for i in range(3):
                model(torch.full((2, 32), 1.0 + i))

    modiff.calibrate(model, loop)
    assert attachment_of(model).step_sizes.largest is None
    loop()


def test_a_checkpoint_keeps_the_step_size_and_one_without_it_is_not_checked(tmp_path):
    modiff.save(calibrated(), tmp_path / "new")
    assert attachment_of(modiff.load(tmp_path / "new", into=toy())).step_sizes.largest == 100
    text = (tmp_path / "new" / "config.json").read_text()
    assert '"largest_step": 100.0' in text
    (tmp_path / "new" / "config.json").write_text(text.replace('"largest_step": 100.0', '"largest_step": null'))
    old = modiff.load(tmp_path / "new", into=toy())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(old, 3)
