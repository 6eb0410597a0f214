"""Learned static scales: of plain layers, of attention, and of residuals between two steps."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import nn

import modiff
from modiff import AttentionConfig, ModulationConfig, QuantizerConfig
from modiff.calibration.reconstruct.layers import full_precision
from tests.calibration.learning import (
    RESIDUAL,
    STATIC,
    STEPS,
    applied,
    error_of,
    layers_of,
    learn,
    static_config,
    widened,
)
from tests.helpers import drifting
from tests.model.toys import sample, toy, toy_unet


@pytest.mark.parametrize(("build", "symmetric"), [(toy, True), (toy_unet, False)])
def test_scales_that_are_far_too_wide_are_learned_down(build, symmetric):
    model, calls = applied(build, static_config(symmetric))
    start = widened(model, calls, 3.0)
    report = learn(model, calls, STEPS)
    assert sum(u.after for u in report.units) < 0.5 * sum(u.before for u in report.units)
    for unit in report.units:
        for name in unit.layers:
            quantizer = layers_of(model)[name].quantizer
            assert unit.learned == (quantizer.static is not start[name])
            for now, was in zip(quantizer.static, start[name], strict=True):
                assert now.scale.shape == was.scale.shape
                if not symmetric:
                    assert torch.equal(now.zero_point, was.zero_point)
    start = {name: quantized.quantizer.static for name, quantized in layers_of(model).items()} if symmetric else start
    if symmetric:  # scales that are right stay
        assert not learn(model, calls, STEPS, learning_rate=20.0, iterations=2, checks=2).learned
        assert all(layers_of(model)[name].quantizer.static is start[name] for name in start)
        return
    moved = [float(t.quantizer.static[-1].scale / start[n][-1].scale) for n, t in layers_of(model).items()]
    assert sum(m < 0.8 for m in moved) > len(moved) / 2


def test_scales_of_attention_are_learned_with_their_block():
    from modiff.hosts.names import BLOCK_CLASSES as DIFFUSERS
    from modiff.model.calibrate import quantizers_of
    from tests.hosts.tiny import HOSTS

    pipe = HOSTS["ddpm"].build()
    calls = modiff.collect(pipe, lambda _: HOSTS["ddpm"].call(pipe, steps=2, batch=4), progress=False)
    attention = AttentionConfig(
        operands=STATIC, softmax=QuantizerConfig(bits=8, symmetric=False, lowest="zero", dynamic=False)
    )
    config = dataclasses.replace(static_config(), attention=attention, include=("*mid_block.attentions*",))
    modiff.apply(pipe, config)
    modiff.calibrate(pipe, lambda: HOSTS["ddpm"].call(pipe, steps=2, batch=4))
    before = {name: quantizer.static for name, quantizer in quantizers_of(pipe.unet).items()}
    report = learn(pipe.unet, calls, STEPS, kinds=DIFFUSERS)
    assert report.units[0].name == "mid_block.attentions.0"
    assert report.units[0].ratio < 0.95
    assert len(report.units) == 4
    assert {u.reason for u in report.units[1:]} == {"lies in no block: the scales of its products stay as measured"}
    for name, quantizer in quantizers_of(pipe.unet).items():
        inside = name.startswith("mid_block.attentions.0.")
        assert (quantizer.static is not before[name]) == inside
        assert not inside or not torch.equal(quantizer.static[0].scale, before[name][0].scale)
    assert {"mid_block.attentions.0.q", "mid_block.attentions.0.softmax"} <= set(before)


def test_residual_scales_are_learned_on_pairs_of_steps():
    model, calls = applied(toy, static_config(modulation=ModulationConfig()), pairs=True)
    start = widened(model, calls, 3.0)
    report = learn(model, calls, RESIDUAL)
    assert [u.layers for u in report.units] == [(n,) for n in ("body", *list(start)[1:])]
    assert sum(u.after for u in report.units) < 0.5 * sum(u.before for u in report.units)
    for name, quantized in layers_of(model).items():
        assert float(quantized.quantizer.static[0].scale) < 0.8 * float(start[name][0].scale)
    exact = sample(toy(), seed=100)
    learned = error_of(model, exact)
    for name, quantized in layers_of(model).items():
        quantized.quantizer.static = start[name]
    assert learned < error_of(model, exact)


def test_the_loss_of_residual_scales_is_that_of_the_layer_run_on_both_inputs():
    """The loss before learning, against the modulated layer itself: two steps of a trajectory, p = 2.4."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16))
    inputs = drifting(0, (6, 16), 2, 0.3, torch.float32)
    calls = modiff.collect(model, lambda _: [model(x) for x in inputs], pairs=True, progress=False)
    modiff.apply(model, dataclasses.replace(static_config(modulation=ModulationConfig()), first_last="quantize"))
    modiff.calibrate(model, lambda: modiff.replay(model, calls))
    report = learn(model, calls, RESIDUAL, held_out=0.5)
    layers_of(model)["0"].quantizer.static = None
    again = learn(model, calls, RESIDUAL, held_out=0.5)
    assert again.units[0].before == pytest.approx(report.units[0].before, rel=1e-5), "min-max is where both start"
    modiff.calibrate(model, lambda: modiff.replay(model, calls))
    with modiff.trajectory(model), torch.no_grad():
        outputs = [model(x) for x in inputs]
    with full_precision(model), torch.no_grad():
        losses = (outputs[1] - model(inputs[1])).abs().pow(2.4).sum(-1)
    means = [float(losses[list(rows)].mean()) for rows in itertools.combinations(range(6), 3)]
    assert min(abs(m / report.units[0].before - 1) for m in means) < 1e-4
