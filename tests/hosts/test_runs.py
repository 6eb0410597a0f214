"""Trajectories of pipelines: what they must be told, seeds that do not repeat, how often the scheduler evaluates."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMPipeline

from modiff import ConfigError
from modiff.hosts.diffusers.runs import calibration_run, call_inputs, evaluations
from tests.helpers import assert_same_bits
from tests.hosts.tiny import HOSTS, make_scheduler


class NeedsImage(DDPMPipeline):
    """A pipeline with an input that modiff cannot make up."""

    def __call__(self, image: object, batch_size: int = 1) -> None:
        raise NotImplementedError


def test_each_run_starts_from_other_noise_and_the_same_each_time():
    pipe = HOSTS["ddim"].build()
    run = calibration_run(pipe, steps=1, batch=2, seed=7)
    seen: list[torch.Tensor] = []
    pipe.unet.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    for index in (0, 1, 0):
        run(index)
    noise = [torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(7 + i)) for i in range(4)]
    assert_same_bits(torch.cat(seen), torch.stack([*noise, *noise[:2]]))


@pytest.mark.parametrize(("name", "wrong"), [("steps", {"steps": 0}), ("num_images", {"batch": 0})])
def test_a_trajectory_without_steps_or_images_is_refused(name, wrong):
    with pytest.raises(ConfigError, match=f"^{name}: expected 1 or more, got 0"):
        calibration_run(HOSTS["ddim"].build(), **{"steps": 2, "batch": 1} | wrong)


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
    pipe = HOSTS["dit"].build()
    labels: list[list[int]] = []
    pipe.transformer.register_forward_pre_hook(
        lambda _m, _a, kwargs: labels.append(kwargs["class_labels"].chunk(2)[0].tolist()), with_kwargs=True
    )
    run = calibration_run(pipe, steps=1, batch=6)
    run(0)
    run(1)
    assert len(set(labels[0])) >= 5
    assert labels[1] != labels[0]


@pytest.mark.parametrize(
    ("host", "prompt", "label", "inputs"),
    [
        ("ddim", None, None, {"batch_size": 2}),
        ("sd", "red fox", None, {"prompt": ["red fox"] * 2}),
        ("sd", ("fox", "cat"), None, {"prompt": ["fox", "cat"]}),
        ("dit", None, 7, {"class_labels": [7, 7]}),
        ("dit", None, [2, 0], {"class_labels": [2, 0]}),
    ],
)
def test_each_kind_of_pipeline_gets_what_it_takes(host, prompt, label, inputs):
    assert call_inputs(HOSTS[host].build(), 2, prompt=prompt, label=label) == inputs


@pytest.mark.parametrize(
    ("host", "prompt", "label", "message"),
    [
        ("sd", None, None, "expected `prompt`, got none"),
        ("dit", None, None, "expected `label`, got none"),
        ("dit", ["fox", "cat"], 1, "expected no `prompt`, got 'fox'"),
        ("sd", "fox", 1, "expected no `label`"),
        ("ddim", "fox", None, "expected no `prompt`"),
        ("dit", None, [2, 1000], "expected 0 to 999, got 1000"),
        ("dit", None, -1, "expected 0 to 999, got -1"),
        ("wan", "fox", None, "one that makes videos"),
    ],
)
def test_what_is_missing_or_too_much_is_named(host, prompt, label, message):
    with pytest.raises(ConfigError, match=message):
        call_inputs(HOSTS[host].build(), 1, prompt=prompt, label=label)


def test_inputs_that_modiff_cannot_invent_are_named():
    with pytest.raises(ConfigError, match="one that needs image"):
        call_inputs(NeedsImage(**HOSTS["ddpm"].build().components), 1, prompt=None, label=None)
