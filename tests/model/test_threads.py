"""Two threads, one model: one of them is told, and the other goes on as if it were alone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import modiff
from modiff import StateError, presets
from modiff.model.attach import Automatic, attachment_of
from modiff.nn import Clock
from tests.helpers import assert_same_bits
from tests.model.toys import sample, toy


class Waits(nn.Module):
    """Passes its input through; the first call says that it is inside and waits until it may go on."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.go_on = threading.Event(), threading.Event()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.inside.is_set():
            self.inside.set()
            self.go_on.wait(10)
        return x


@pytest.mark.parametrize("automatic", [False, True])
def test_an_evaluation_inside_that_of_another_thread_is_refused_and_disturbs_nothing(automatic):
    model = toy()
    modiff.apply(model, presets.published(8, 4))
    with modiff.trajectory(model):
        expected = sample(model)
    attachment, waits = attachment_of(model), Waits()
    attachment.automatic = Automatic(attachment.clock) if automatic else None
    model.norm = nn.Sequential(model.norm, waits)

    def run() -> list[torch.Tensor]:
        if automatic:
            return sample(model)
        with modiff.trajectory(model):
            return sample(model)

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(run)
        waits.inside.wait(10)
        with pytest.raises(StateError, match="Toy: expected one evaluation at a time, got one while another thread"):
            sample(model, seed=1)
        waits.go_on.set()
        for ours, theirs in zip(other.result(), expected, strict=True):
            assert_same_bits(ours, theirs)


def test_a_generation_of_another_thread_is_another_trajectory_though_time_goes_on():
    model, x = toy(), torch.ones(2, 3, 4, 4)
    modiff.apply(model, presets.published(8, 4))
    with modiff.trajectory(model), torch.no_grad():
        expected = model(x, 400.0)
    attachment = attachment_of(model)
    attachment.automatic = Automatic(attachment.clock)
    with ThreadPoolExecutor(1) as pool:
        sample(model, steps=2)  # ends at t = 500
        assert_same_bits(pool.submit(torch.no_grad()(model), x, 400.0).result(), expected)


def test_of_threads_that_start_one_trajectory_at_once_one_does_and_each_other_is_told():
    for _ in range(20):
        clock, barrier = Clock("model"), threading.Barrier(4)
        for _ in range(50):
            clock.on_reset(lambda: threading.Event().wait(1e-4))  # while one thread frees states, others run

        def start(clock: Clock = clock, barrier: threading.Barrier = barrier) -> bool:
            barrier.wait(10)
            try:
                clock.start()
            except StateError:
                return False
            return True

        with ThreadPoolExecutor(4) as pool:
            started = [future.result() for future in [pool.submit(start) for _ in range(4)]]
        assert sum(started) == 1
