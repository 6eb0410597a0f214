"""Replaying calls: plain layers see inputs, modulated ones the residual of a pair, wherever the calls come from."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import modiff
from modiff import CalibrationError, UniformGroups
from modiff.calibration.collect import record_calls
from modiff.model.attach import attachment_of
from tests.model.toys import activations_only, sample, toy

STEPS = 6


def calls(model, pairs: bool, sampler=None):
    return record_calls(
        model, lambda i: sample(model, STEPS, seed=i), trajectories=2, steps=STEPS, pairs=pairs, progress=False,
        sampler=sampler,
    )  # fmt: skip


def static(modulated: bool, **settings):
    config = activations_only(8, dynamic=False, **settings)
    return config if modulated else dataclasses.replace(
        config, layer=dataclasses.replace(config.layer, modulation=None)
    )  # fmt: skip


def scales(model) -> dict[str, float]:
    return {name: float(quantized.quantizer.static[0].scale) for name, quantized in attachment_of(model).layers.items()}


def body_inputs(found) -> list[torch.Tensor]:
    """What the layer `body` is given in full precision, for each call."""
    model, seen = toy(), []
    model.body.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with torch.no_grad():
        for call in found:
            call.evaluate(model)
    return seen


def test_plain_layers_are_calibrated_on_the_calls_alone():
    model = toy()
    found = calls(model, pairs=False, sampler=UniformGroups(groups=2))
    modiff.apply(model, static(False))
    modiff.calibrate(model, lambda: modiff.replay(model, found))
    largest = max(float(x.abs().max()) for x in body_inputs(found))
    assert scales(model)["body"] == pytest.approx(largest / 127, rel=1e-5)


def test_modulated_layers_are_calibrated_on_the_residual_of_each_pair():
    """MoDiff, residual ranges: (max - min) of a_t - a_prev over all calibration data."""
    model = toy()
    found = calls(model, pairs=True)
    modiff.apply(model, static(True))
    modiff.calibrate(model, lambda: modiff.replay(model, found))
    now = body_inputs([c for c in found if c.previous is not None])
    before = body_inputs([c.previous for c in found if c.previous is not None])
    assert len(now) == 2 * (STEPS - 1)
    largest = max(float((a - b).abs().max()) for a, b in zip(now, before, strict=True))
    assert scales(model)["body"] == pytest.approx(largest / 127, rel=1e-4)
    assert largest < 0.7 * max(float(a.abs().max()) for a in now), "the two must differ, else nothing is tested"


def test_modulated_layers_need_pairs():
    model = toy()
    found = calls(model, pairs=False)
    modiff.apply(model, static(True))
    with pytest.raises(CalibrationError, match="replay: expected calls with the one before each, got none among 12"):
        modiff.replay(model, found)


def test_a_network_without_modiff_is_just_evaluated():
    model, ran = toy(), []
    found = calls(model, pairs=True)
    model.register_forward_hook(lambda *_: ran.append(1))
    modiff.replay(model, found)
    assert len(ran) == len(found)
