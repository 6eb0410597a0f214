"""Calibration data of pipelines: both branches of guidance, the right component, and nothing left behind."""

from __future__ import annotations

import pytest
import torch

import modiff
from modiff import CalibrationSet, ConfigError, NormalSteps, UniformGroups
from tests.helpers import assert_same_bits
from tests.hosts.tiny import HOSTS, build_wan_of_two


@pytest.mark.parametrize("name", ["ddim", "sd", "flux"])
def test_kept_calls_evaluate_to_what_the_pipeline_saw(name):
    host = HOSTS[name]
    pipe = host.build()
    model = host.network(pipe)
    seen: list[torch.Tensor] = []
    handle = model.register_forward_hook(lambda _m, _a, output: seen.append(output[0].clone()))
    calls = modiff.collect(
        pipe, lambda i: host.call(pipe, steps=4, seed=i), steps=4, sampler=UniformGroups(groups=2), progress=False
    )
    handle.remove()
    branches = host.calls_per_step
    assert [c.step for c in calls] == [0] * branches + [2] * branches
    if branches == 2:
        assert [c.context for c in calls] == ["cond", "uncond"] * 2
    with torch.no_grad():
        for call, output in zip(calls, seen[:branches] + seen[2 * branches : 3 * branches], strict=True):
            assert_same_bits(call.evaluate(model)[0], output)
    assert "cache_context" not in model.__dict__
    assert "_modiff" not in model.__dict__


def test_rows_of_a_batch_are_the_calls_of_each_sample(tmp_path):
    host = HOSTS["sd"]
    pipe = host.build()
    calls = modiff.collect(
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
    assert sum(len(c.rows) or 3 for c in calls) == 6
    assert any(c.rows for c in calls)
    for call in calls:
        rows = list(call.rows) or [0, 1, 2]
        assert call.args[0].shape[0] == 2 * len(rows), "unconditional and conditional"
        seed = 10 * call.trajectory + rows[0]
        alone = modiff.collect(pipe, lambda i, s=seed: host.call(pipe, steps=4, seed=s), progress=False)
        for kept, step in ((call, call.step), (call.previous, call.step - 1)):
            if step >= 0:
                assert float((kept.args[0][[0, len(rows)]] - alone[step].args[0]).abs().max()) < 1e-4
    assert len(CalibrationSet.load(tmp_path)) == len(calls)


def test_a_modulated_pipeline_gives_its_quantized_states_and_keeps_following_contexts():
    host = HOSTS["flux"]
    pipe = host.build()
    plain = modiff.collect(pipe, lambda i: host.call(pipe), progress=False)
    modiff.apply(pipe, modiff.presets.modulated(8, 2))
    image = host.call(pipe)
    quantized = modiff.collect(pipe, lambda i: host.call(pipe), progress=False)
    assert [c.context for c in quantized] == [c.context for c in plain] == ["cond", "uncond"] * 4
    assert_same_bits(quantized[0].kwargs["hidden_states"], plain[0].kwargs["hidden_states"])
    assert float((quantized[-1].kwargs["hidden_states"] - plain[-1].kwargs["hidden_states"]).abs().max()) > 1e-4
    assert_same_bits(host.call(pipe), image)


def test_of_a_pipeline_with_several_denoisers_one_is_named():
    pipe = build_wan_of_two()
    for name in (None, "vae"):
        message = rf"collect\.component: expected one of transformer, transformer_2, got {name!r}"
        with pytest.raises(ConfigError, match=message):
            modiff.collect(pipe, lambda i: None, component=name)
    sizes = {
        name: len(modiff.collect(pipe, lambda i: HOSTS["wan"].call(pipe), component=name, progress=False))
        for name in ("transformer", "transformer_2")
    }
    assert sum(sizes.values()) == 4 * 2
    assert min(sizes.values()) > 0
