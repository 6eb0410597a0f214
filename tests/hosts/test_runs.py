"""Runs of pipelines: what they must be told, their seeds and evaluations; and the verbs that learn from them."""

import json
from collections import Counter
from unittest.mock import Mock

import pytest
import torch

import modiff
from modiff import ConfigError, UniformGroups, presets
from modiff.calibration.blocks import blocks_of
from modiff.calibration.reconstruct.layers import full_precision
from modiff.errors import FormatError
from modiff.hosts.diffusers.runs import calibration_run, call_inputs, evaluations, noise_generators, pixels_of
from modiff.hosts.names import BLOCK_CLASSES
from modiff.kernels.isa import machine
from modiff.model.attach import attachment_of
from tests.helpers import assert_same_bits
from tests.hosts.tiny import HOSTS, SMALL, build_wan_of_two, make_scheduler


def test_each_run_starts_from_other_noise_and_the_same_each_time():
    pipe, seen = HOSTS["ddim"].build(), []
    run = calibration_run(pipe, steps=1, batch=2, seed=7)
    pipe.unet.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    for index in (0, 1, 0):
        run(index)
    noise = [torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(7 + i)) for i in range(4)]
    assert_same_bits(torch.cat(seen), torch.stack([*noise, *noise[:2]]))


@pytest.mark.parametrize(("scheduler", "count"), [("ddim", 5), ("heun", 9), ("dpm++2m", 5)])
def test_evaluations_are_counted_as_the_scheduler_runs_them(scheduler, count):
    host = HOSTS["sd"]
    pipe = host.build()
    pipe.scheduler = make_scheduler(scheduler)
    assert evaluations(pipe, 5) == count
    ran: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda *_: ran.append(1))
    host.call(pipe, steps=5)
    assert len(ran) == count


def test_classes_are_drawn_from_all_of_them_and_not_one_for_all():
    pipe, labels = HOSTS["dit"].build(), []
    pipe.transformer.register_forward_pre_hook(
        lambda _m, _a, words: labels.append(words["class_labels"].chunk(2)[0].tolist()), with_kwargs=True
    )
    run = calibration_run(pipe, steps=1, batch=6)
    run(0)
    run(1)
    assert len(set(labels[0])) >= 5
    assert labels[1] != labels[0]


@pytest.mark.parametrize(
    ("host", "prompt", "label", "message"),
    [
        ("sd", None, None, "expected `prompt`, got none"),
        ("dit", None, None, "expected `label`, got none"),
        ("dit", ["fox", "cat"], 1, "expected no `prompt`, got 'fox'"),
        ("sd", "fox", 1, "expected no `label`"),
        ("dit", None, [2, 1000], "expected 0 to 999, got 1000"),
        ("dit", None, -1, "expected 0 to 999, got -1"),
        ("wan", "fox", None, "one that makes videos"),
    ],
)
def test_what_is_missing_or_too_much_is_named(host, prompt, label, message):
    with pytest.raises(ConfigError, match=message):
        call_inputs(HOSTS[host].build(), 1, prompt=prompt, label=label)


@pytest.mark.parametrize("applied", [False, True])
def test_an_error_of_the_pipelines_own_call_is_one_line_and_one_of_ours_keeps_its_traceback(applied, monkeypatch):
    pipe, noise = HOSTS["sd3"].build(), noise_generators(0, [0])  # its text encoders have no projection
    if applied:
        modiff.apply(pipe, "w8a8")
    with pytest.raises(ConfigError, match=r"^StableDiffusion3Pipeline: .* got RuntimeError \(Number of dimensions"):
        pixels_of(pipe, call_inputs(pipe, 1, prompt="fox", label=None), 1, noise)
    if applied:
        modiff.apply(ours := SMALL.build(), "w8a8")
        monkeypatch.setattr("modiff.nn.layer.ModulatedLayer.run", Mock(side_effect=KeyError("a fault")))
        with pytest.raises(KeyError, match="a fault"):
            pixels_of(ours, call_inputs(ours, 1, prompt=None, label=None), 1, noise)


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_kept_calls_evaluate_to_what_the_pipeline_saw(name):
    host, seen = HOSTS[name], []
    pipe = host.build()
    model, branches = host.network(pipe), host.calls_per_step
    handle = model.register_forward_hook(lambda _m, _a, output: seen.append(output[0].clone()))
    run, sampler = (lambda i: host.call(pipe, steps=4, seed=i)), UniformGroups(groups=2)
    calls = modiff.collect(pipe, run, steps=4, sampler=sampler, progress=False)
    handle.remove()
    contexts = ["cond", "uncond"] if branches == 2 else ["default"]
    assert [(c.step, c.context) for c in calls] == [(step, context) for step in (0, 2) for context in contexts]
    with torch.no_grad():
        for call, output in zip(calls, seen[:branches] + seen[2 * branches : 3 * branches], strict=True):
            assert_same_bits(call.evaluate(model)[0], output)
    assert not {"cache_context", "_modiff"} & set(model.__dict__)


def test_of_a_pipeline_with_several_denoisers_one_is_named():
    pipe = build_wan_of_two()
    with pytest.raises(ConfigError, match=r"component: expected one of transformer, transformer_2, got 'vae'"):
        modiff.collect(pipe, lambda i: None, component="vae")
    run, sizes = (lambda i: HOSTS["wan"].call(pipe)), []
    for name in ("transformer", "transformer_2"):
        sizes.append(len(modiff.collect(pipe, run, component=name, progress=False)))
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


def test_times_of_this_machine_join_those_of_others_and_give_the_same_choice_again(tmp_path, monkeypatch):
    seconds, profile = {"float": 3.0, "plain": 1.0, "modulated": 2.0}, tmp_path / "profile.json"
    monkeypatch.setattr("modiff.model.autotune.measure_layer", lambda *_: seconds)
    profile.write_text(json.dumps({"another": {"layers": {}}}))
    result = modiff.autotune(SMALL.build(), tolerance=0.5, steps=3, profile=profile)
    times = json.loads(profile.read_text())
    assert set(times) == {"another", machine()}
    assert all(set(row) == set(seconds) for row in times[machine()]["layers"].values())
    assert modiff.autotune(SMALL.build(), tolerance=0.5, steps=3, profile=profile) == result
    modiff.apply(pipe := SMALL.build(), result.config)
    assert torch.isfinite(SMALL.call(pipe)).all()


@pytest.mark.parametrize("text", ["[1]", "{", "[" * 100_000, '{"MACHINE": {"layers": {"a": {"float": 1.0}}}}'])
def test_a_file_that_is_no_profile_is_refused_and_survives(tmp_path, text):
    profile, text = tmp_path / "profile.json", text.replace("MACHINE", machine())
    profile.write_text(text)
    with pytest.raises(FormatError, match="expected a profile that modiff wrote"):
        modiff.autotune(SMALL.build(), steps=2, profile=profile)
    assert profile.read_text() == text
