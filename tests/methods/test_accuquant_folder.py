"""AccuQuant's folder: interrupted anywhere, the same call goes on to the same bits; another job's parts are refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

import modiff
from modiff import ConfigError, FormatError
from modiff.methods import accuquant
from modiff.methods.accuquant import AccuquantConfig, AccuquantReport, apply_accuquant
from modiff.methods.registry import quantize
from modiff.methods.sampler_steps import sampler_tables, with_tables
from modiff.model.attach import attachment_of
from modiff.model.calibrate import quantizers_of
from tests.helpers import assert_same_bits
from tests.methods import small

SMALL = AccuquantConfig(
    weight_bits=None, activation_bits=3, steps=4, samples=4, batch=2, group_size=2, iterations=2, learning_rate=0.1
)


def scales_of(pipe: Any) -> dict[str, Tensor]:
    return {f"{n}.{k}": t for n, c in quantizers_of(pipe.unet).items() for k, t in c.state_dict_tensors().items()}


def assert_same_scales(mine: Any, other: Any) -> None:
    found, expected = scales_of(mine), scales_of(other)
    assert found.keys() == expected.keys()
    for name in expected:
        assert_same_bits(found[name], expected[name])


def learned(folder: Path | None, config: AccuquantConfig = SMALL) -> tuple[Any, AccuquantReport]:
    pipe = small.build()
    return pipe, apply_accuquant(pipe, config, folder=folder, progress=False)


@pytest.fixture(scope="module")
def whole() -> tuple[Any, AccuquantReport]:
    """Without a folder, in one go."""
    return learned(None)


def stop_before(monkeypatch: pytest.MonkeyPatch, group: int) -> None:
    """Ctrl-C as soon as this group is about to be learned."""
    learn = accuquant._learn_group

    def learn_or_stop(*args: Any) -> Any:
        if args[3] == group:
            raise KeyboardInterrupt
        return learn(*args)

    monkeypatch.setattr(accuquant, "_learn_group", learn_or_stop)


@pytest.mark.parametrize("group", [0, 1])
def test_a_job_that_was_stopped_before_any_group_goes_on_to_the_same_bits(group, whole, tmp_path, monkeypatch):
    pipe = small.build()
    with monkeypatch.context() as patch:
        stop_before(patch, group)
        with pytest.raises(KeyboardInterrupt):
            apply_accuquant(pipe, SMALL, folder=tmp_path, progress=False)
    assert attachment_of(pipe.unet) is None
    assert len(list((tmp_path / "groups").glob("*.safetensors"))) == group
    assert not list(tmp_path.rglob("*.partial"))

    def never(index: int) -> object:
        raise AssertionError(f"trajectory {index} was run again")

    seen: list[int] = []
    learn = accuquant._learn_group
    monkeypatch.setattr(accuquant, "_learn_group", lambda *args: seen.append(args[3]) or learn(*args))
    fresh = small.build()
    report = apply_accuquant(fresh, SMALL, run=never, folder=tmp_path, progress=False)
    assert seen == [0, 1][group:]
    assert report.groups == whole[1].groups
    assert_same_scales(fresh, whole[0])
    assert_same_bits(small.call(fresh, steps=4), small.call(whole[0], steps=4))


def test_the_kept_scales_are_learned_ones_and_a_finished_job_learns_nothing_again(whole, tmp_path, monkeypatch):
    assert any(group.after < group.before for group in whole[1].groups)
    _, report = learned(tmp_path)
    monkeypatch.setattr(accuquant, "_learn_group", None)
    again, second = learned(tmp_path)
    assert second == report
    assert_same_scales(again, whole[0])


def test_a_job_that_was_stopped_while_trajectories_ran_goes_on_with_those_that_are_missing(whole, tmp_path):
    from modiff.hosts.diffusers.runs import calibration_run

    pipe, ran = small.build(), []

    def until(index: int) -> object:
        if index == 1:
            raise KeyboardInterrupt
        return run(index)

    def noted(index: int) -> object:
        ran.append(index)
        return run(index)

    run = calibration_run(pipe, steps=4, batch=2)
    with pytest.raises(KeyboardInterrupt):
        apply_accuquant(pipe, SMALL, run=until, folder=tmp_path, progress=False)
    apply_accuquant(pipe, SMALL, run=noted, folder=tmp_path, progress=False)
    assert ran == [1]
    assert_same_scales(pipe, whole[0])


def test_learned_rounding_and_scales_without_groups_of_their_own_resume_too(tmp_path, monkeypatch):
    rounding = dataclasses.replace(modiff.ReconstructConfig.quick_weights(), iterations=4, batch=4, checks=1)
    config = dataclasses.replace(
        SMALL, weight_bits=3, steps=2, rounding="learned", reconstruction=rounding, group_size=2, samples=2
    )
    one, _ = learned(tmp_path, config)
    assert {path.name for path in tmp_path.iterdir()} == {
        "job.json",
        "calls",
        "groups",
        "sampler.safetensors",
        "weights",
    }
    monkeypatch.setattr(accuquant, "_learn_group", None)
    two, _ = learned(tmp_path, config)
    assert all(quantized.quantized_weight.fixed for quantized in attachment_of(two.unet).layers.values())
    assert_same_scales(two, one)
    assert_same_bits(small.call(two, steps=2), small.call(one, steps=2))


def test_several_trajectories_each_go_on_from_where_they_arrived():
    """The mean over all of them, against the states of one batch of the pipeline."""
    config = dataclasses.replace(SMALL, steps=6, iterations=1)
    pipe, report = learned(None, config)
    states: dict[bool, list[Tensor]] = {}
    for quantized, source in ((True, pipe), (False, small.build())):
        seen = states[quantized] = []
        handle = source.unet.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].clone()))
        noise = [torch.Generator().manual_seed(i) for i in range(4)]
        source(batch_size=4, generator=noise, num_inference_steps=6, output_type="np")
        handle.remove()
    for group, at in zip(report.groups[:2], (2, 4), strict=True):
        error = (states[True][at] - states[False][at]).square().flatten(1).sum(1).mean()
        assert group.after == pytest.approx(float(error), rel=1e-3)


def test_quantize_hands_the_folder_on_and_it_serves_one_job(whole, tmp_path):
    pipe = small.build()
    quantize(pipe, SMALL, folder=tmp_path / "work", progress=False)
    assert_same_scales(pipe, whole[0])
    assert len(list((tmp_path / "work" / "groups").glob("*.safetensors"))) == 2
    with pytest.raises(ConfigError, match="got one with another settings"):
        quantize(small.build(), dataclasses.replace(SMALL, learning_rate=0.2), folder=tmp_path / "work", progress=False)


def test_groups_of_other_settings_or_weights_and_damaged_files_are_refused_and_nothing_is_left_applied(tmp_path):
    learned(tmp_path)
    pipe = small.build()
    with pytest.raises(ConfigError, match="got one with another settings"):
        apply_accuquant(pipe, dataclasses.replace(SMALL, iterations=5), folder=tmp_path, progress=False)
    pipe.unet.conv_in.bias.data[0] += 1e-6
    with pytest.raises(ConfigError, match="got one with another model"):
        apply_accuquant(pipe, SMALL, folder=tmp_path, progress=False)
    assert attachment_of(pipe.unet) is None
    path = tmp_path / "sampler.safetensors"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(FormatError, match=r"sampler\.safetensors: expected the tables of a sampler, got Safetensor"):
        learned(tmp_path)
    path.unlink()
    with pytest.raises(FormatError, match=r"sampler\.safetensors: expected the tables of a sampler, got FileNotFound"):
        learned(tmp_path)


def test_a_scheduler_set_from_tables_steps_as_the_one_they_were_taken_from():
    used = FlowMatchEulerDiscreteScheduler(shift=3.0)
    used.set_timesteps(4, mu=None)
    fresh = FlowMatchEulerDiscreteScheduler(shift=3.0)
    before = fresh.timesteps.clone()
    copied = with_tables(fresh, sampler_tables(used))
    assert_same_bits(copied.timesteps, used.timesteps)
    assert_same_bits(copied.sigmas, used.sigmas)
    assert copied.num_inference_steps == 4
    assert torch.equal(fresh.timesteps, before), "the pipeline's own scheduler is left alone"
