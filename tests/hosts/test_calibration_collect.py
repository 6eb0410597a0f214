"""Calibration data of pipelines: both branches of guidance, the right component, and nothing left behind."""

from __future__ import annotations

import pytest
import torch

import modiff
from modiff import CalibrationSet, ConfigError, NormalSteps, UniformGroups
from tests.helpers import assert_same_bits
from tests.hosts.tiny import HOSTS, TinyHost


def denoiser(host: TinyHost, pipe):
    return getattr(pipe, host.denoiser)


@pytest.mark.parametrize("name", ["ddim", "sd", "dit", "flux", "wan"])
def test_kept_calls_evaluate_to_what_the_pipeline_saw(name):
    host = HOSTS[name]
    pipe = host.build()
    model = denoiser(host, pipe)
    seen: list[torch.Tensor] = []
    handle = model.register_forward_hook(lambda _m, _a, output: seen.append(output[0].clone()))
    found = modiff.collect(
        pipe, lambda i: host.call(pipe, steps=4, seed=i), steps=4, sampler=UniformGroups(groups=2), progress=False
    )
    handle.remove()
    branches = host.calls_per_step
    assert [c.step for c in found] == [0] * branches + [2] * branches
    if branches == 2:
        assert [c.context for c in found] == ["cond", "uncond"] * 2
    with torch.no_grad():
        for call, true in zip(found, seen[:branches] + seen[2 * branches : 3 * branches], strict=True):
            assert_same_bits(call.evaluate(model)[0], true)
    assert "cache_context" not in model.__dict__
    assert "_modiff" not in model.__dict__


def test_rows_of_a_batch_are_the_samples_own_calls(tmp_path):
    host = HOSTS["sd"]
    pipe = host.build()
    found = modiff.collect(
        pipe,
        lambda i: host.call(pipe, steps=4, seed=10 * i, batch=3),
        trajectories=2,
        batch=3,
        steps=4,
        sampler=NormalSteps(),
        pairs=True,
        folder=tmp_path,
        progress=False,
    )
    assert sum(len(c.rows) or 3 for c in found) == 6
    assert any(c.rows for c in found)
    for call in found:
        rows = list(call.rows) or [0, 1, 2]
        assert call.args[0].shape[0] == 2 * len(rows), "unconditional and conditional"
        alone = modiff.collect(
            pipe, lambda i, s=10 * call.trajectory + rows[0]: host.call(pipe, steps=4, seed=s), progress=False
        )
        mine = call.args[0][[0, len(rows)]]
        assert float((mine - alone[call.step].args[0]).abs().max()) < 1e-4
        if call.step:
            before = call.previous.args[0][[0, len(rows)]]
            assert float((before - alone[call.step - 1].args[0]).abs().max()) < 1e-4
    assert len(CalibrationSet.load(tmp_path)) == len(found)


def test_a_modulated_pipeline_gives_its_own_states_and_keeps_following_contexts():
    host = HOSTS["flux"]
    pipe = host.build()
    plain = modiff.collect(pipe, lambda i: host.call(pipe), progress=False)
    modiff.apply(pipe, modiff.presets.modulated(8, 2))
    image = host.call(pipe)
    coded = modiff.collect(pipe, lambda i: host.call(pipe), progress=False)
    assert [c.context for c in coded] == [c.context for c in plain] == ["cond", "uncond"] * 4
    assert_same_bits(coded[0].kwargs["hidden_states"], plain[0].kwargs["hidden_states"])
    assert float((coded[-1].kwargs["hidden_states"] - plain[-1].kwargs["hidden_states"]).abs().max()) > 1e-4
    assert_same_bits(host.call(pipe), image)


def test_a_pipeline_with_several_denoisers_must_say_which():
    pipe = HOSTS["wan"].build()
    pipe.register_modules(transformer_2=HOSTS["wan"].build().transformer)
    with pytest.raises(ConfigError, match=r"collect\.component: expected one of transformer, transformer_2, got None"):
        modiff.collect(pipe, lambda i: None)
    with pytest.raises(ConfigError, match=r"got 'vae'"):
        modiff.collect(pipe, lambda i: None, component="vae")
    found = modiff.collect(pipe, lambda i: HOSTS["wan"].call(pipe, steps=2), component="transformer", progress=False)
    assert len(found) == 4
