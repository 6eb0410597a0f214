"""Verbs that learn from a host: which calls they keep, which blocks they find, what they sample with."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch

import modiff
from modiff import ConfigError, UniformGroups, presets
from modiff.calibration.blocks import blocks_of
from modiff.calibration.reconstruct.layers import full_precision
from modiff.errors import FormatError
from modiff.hosts.names import BLOCK_CLASSES
from modiff.kernels.isa import machine
from modiff.model.attach import attachment_of
from tests.helpers import assert_same_bits
from tests.hosts.tiny import HOSTS, SMALL, build_wan_of_two


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


def test_of_a_pipeline_with_several_denoisers_one_is_named():
    pipe = build_wan_of_two()
    for name in (None, "vae"):
        message = rf"collect\.component: expected one of transformer, transformer_2, got {name!r}"
        with pytest.raises(ConfigError, match=message):
            modiff.collect(pipe, lambda i: None, component=name)
    sizes = [
        len(modiff.collect(pipe, lambda i: HOSTS["wan"].call(pipe), component=name, progress=False))
        for name in ("transformer", "transformer_2")
    ]
    assert sum(sizes) == 4 * 2
    assert min(sizes) > 0


BLOCKS = {
    "ddpm": {"ResnetBlock2D": 8, "Attention": 4, "ModulatedConv2d": 2},
    "sdxl": {"ResnetBlock2D": 8, "BasicTransformerBlock": 8, "ModulatedLinear": 8, "ModulatedConv2d": 2},
    "pixart": {"BasicTransformerBlock": 2},
    "sd3": {"JointTransformerBlock": 2},
    "flux": {"FluxTransformerBlock": 1, "FluxSingleTransformerBlock": 1},
    "wan": {"WanTransformerBlock": 2},
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_cover_every_modulated_layer_once_and_run_in_their_order(name):
    host = HOSTS[name]
    pipe = host.build()
    model = host.network(pipe)
    call = modiff.collect(pipe, lambda _: host.call(pipe, steps=2), progress=False)[0]
    modiff.apply(pipe, presets.w4a8())
    seen: list[str] = []
    with full_precision(model), torch.no_grad():
        blocks = blocks_of(model, kinds=BLOCK_CLASSES, run=lambda: call.evaluate(model))
        for block in blocks:
            model.get_submodule(block.name).register_forward_pre_hook(lambda *_, n=block.name: seen.append(n))
        call.evaluate(model)
    assert Counter(block.kind for block in blocks) == BLOCKS[name]
    assert sorted(n for block in blocks for n in block.layers) == sorted(attachment_of(model).layers)
    assert seen == [block.name for block in blocks]
    assert {block.calls for block in blocks} == {1}


def test_a_tuned_pipeline_samples_and_the_same_file_gives_the_same_config(tmp_path, monkeypatch):
    seconds = {"float": 3.0, "plain": 1.0, "modulated": 2.0}
    monkeypatch.setattr("modiff.model.autotune.measure_layer", lambda *_: seconds)
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps({"another": {"layers": {}}}))  # times of another machine
    pipe = SMALL.build()
    result = modiff.autotune(pipe, tolerance=0.5, steps=3, profile=profile)
    times = json.loads(profile.read_text())
    assert set(times) == {"another", machine()}
    assert times["another"]["layers"] == {}
    assert all(set(row) == set(seconds) for row in times[machine()]["layers"].values())
    assert modiff.autotune(pipe, tolerance=0.5, steps=3, profile=profile) == result
    assert result.pays
    modiff.apply(pipe, result.config)
    assert torch.isfinite(SMALL.call(pipe)).all()


@pytest.mark.parametrize("text", ["[1]", "{", "[" * 100_000, '{"MACHINE": {"layers": {"a": {"float": 1.0}}}}'])
def test_a_file_that_is_no_profile_is_refused_and_survives(tmp_path, text):
    profile, text = tmp_path / "profile.json", text.replace("MACHINE", machine())
    profile.write_text(text)
    with pytest.raises(FormatError, match="expected a profile that modiff wrote"):
        modiff.autotune(SMALL.build(), steps=2, profile=profile)
    assert profile.read_text() == text
