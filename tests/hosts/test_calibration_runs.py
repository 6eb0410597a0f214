"""Trajectories to calibrate on: seeds that do not repeat, and how often the scheduler evaluates."""

from __future__ import annotations

import pytest
import torch

from modiff import ConfigError
from modiff.hosts.diffusers.runs import calibration_run, evaluations
from tests.helpers import assert_same_bits
from tests.hosts.parts import with_scheduler
from tests.hosts.tiny import HOSTS, TinyHost


def starts(host: TinyHost, pipe, run, count: int) -> list[torch.Tensor]:
    """The first input of each run."""
    found: list[torch.Tensor] = []
    seen = getattr(pipe, host.denoiser).register_forward_pre_hook(lambda _, args: found.append(args[0].clone()))
    firsts = []
    for index in range(count):
        found.clear()
        run(index)
        firsts.append(found[0])
    seen.remove()
    return firsts


def test_each_run_starts_from_noise_of_its_own_and_the_same_each_time():
    host = HOSTS["ddim"]
    pipe = host.build()
    run = calibration_run(pipe, steps=1, batch=2, seed=7)
    first, second, again = starts(host, pipe, lambda i: run(i % 2), 3)
    assert_same_bits(again, first)
    rows = [*first, *second]
    for i, row in enumerate(rows):
        noise = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(7 + i))
        assert_same_bits(row, noise)


@pytest.mark.parametrize(("scheduler", "count"), [("ddim", 5), ("heun", 9), ("euler", 5), ("dpm++2m", 5)])
def test_evaluations_are_counted_as_the_scheduler_runs_them(scheduler, count):
    host = HOSTS["sd"]
    pipe = with_scheduler(host.build(), scheduler)
    assert evaluations(pipe, 5) == count
    ran: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda *_: ran.append(1))
    host.call(pipe, steps=5)
    assert len(ran) == count


@pytest.mark.parametrize("name", ["sd", "flux", "pixart"])
def test_a_pipeline_that_takes_a_prompt_must_be_given_a_run(name):
    with pytest.raises(ConfigError, match="expected run=, a function that generates from prompts, got none"):
        calibration_run(HOSTS[name].build(), steps=2, batch=1)


def test_classes_are_drawn_from_all_of_them_and_not_one_for_all():
    pipe = HOSTS["dit"].build()
    labels: list[int] = []
    pipe.transformer.register_forward_pre_hook(
        lambda _m, _a, kwargs: labels.extend(kwargs["class_labels"][: len(kwargs["class_labels"]) // 2].tolist()),
        with_kwargs=True,
    )
    run = calibration_run(pipe, steps=1, batch=6)
    run(0)
    first = labels.copy()
    run(1)
    assert len(set(first)) >= 5
    assert labels[6:] != first
