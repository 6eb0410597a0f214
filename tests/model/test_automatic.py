"""Trajectories that begin by themselves: where time turns round, and never inside one that somebody else began."""

from __future__ import annotations

import pytest
import torch

import modiff
from modiff import StateError, presets
from modiff.model.attach import Automatic, attachment_of
from modiff.nn import Clock
from tests.helpers import assert_same_bits
from tests.model.toys import sample, toy


def starts(times: list[float], contexts: list[str] | None = None) -> list[int]:
    """Indices of the evaluations at which a trajectory began."""
    clock = Clock("model")
    automatic = Automatic(clock)
    found, began = [], [0]
    clock.on_reset(lambda: began.append(1))
    for i, t in enumerate(times):
        clock.context = contexts[i] if contexts else "default"
        before = len(began)
        automatic.before(torch.tensor([t]))
        found += [i] if len(began) > before else []
        assert clock.active
        assert clock.context == (contexts[i] if contexts else "default")
        clock.call(t)
        clock.returned()
    return found


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([999, 666, 333, 999, 666, 333], [0, 3]),
        ([999, 500, 500, 0, 999, 500, 500, 0], [0, 4]),  # Heun evaluates twice at a time
        ([999, 500, 999, 500], [0, 2]),
        ([0.0, 0.3, 0.9, 0.0, 0.3], [0, 3]),  # flows that count upwards
        ([999, 999, 999], [0, 1, 2]),  # one step each
        ([999, 666, 800, 400], [0, 2]),  # image to image, from the middle
        ([1000, 1], [0]),
    ],
)
def test_one_ends_where_time_turns_round(times, expected):
    assert starts(times) == expected


@pytest.mark.parametrize("first_frame", [0.0, 1000.0])
def test_tokens_held_at_one_time_do_not_hide_that_time_goes_on(first_frame):
    times = [torch.tensor([[first_frame, first_frame, t, t]]) for t in (999.0, 666.0, 333.0, 999.0, 666.0)]
    clock, began = Clock("model"), []
    automatic = Automatic(clock)
    clock.on_reset(lambda: began.append(clock.active))
    found = []
    for i, t in enumerate(times):
        before = len(began)
        automatic.before(t)
        found += [i] if len(began) > before else []
    assert found == [0, 3]


def test_one_whose_evaluation_raised_is_over_and_the_next_call_begins_another():
    model, x = automatic_toy(), torch.ones(2, 3, 4, 4)
    expected = model(x, 5.0)  # the first step of a trajectory
    attachment_of(model).automatic.end()
    model(x + 1, 9.0)
    with pytest.raises(AttributeError):
        model(None, 7.0)
    assert not attachment_of(model).clock.active
    assert_same_bits(model(x, 5.0), expected)


def test_another_batch_is_another_trajectory_though_time_goes_on():
    model, x = automatic_toy(), torch.ones(1, 3, 4, 4)
    expected = model(x, 333.0)
    attachment_of(model).automatic.end()
    sample(model, steps=2)
    assert_same_bits(model(x, 333.0), expected)


def automatic_toy(bits: int = 4) -> torch.nn.Module:
    model = toy()
    modiff.apply(model, presets.published(8, bits))
    attachment = attachment_of(model)
    attachment.automatic = Automatic(attachment.clock)
    return model


def test_generations_in_a_row_equal_those_in_trajectories_of_their_own():
    model, guarded = automatic_toy(), toy()
    modiff.apply(guarded, presets.published(8, 4))
    for seed in (0, 1, 0):
        with modiff.trajectory(guarded):
            expected = sample(guarded, seed=seed)
        for ours, theirs in zip(sample(model, seed=seed), expected, strict=True):
            assert_same_bits(ours, theirs)


def test_a_trajectory_of_somebody_else_is_left_alone_and_takes_over():
    model = automatic_toy(0)
    sample(model)  # one that began by itself still runs
    with modiff.trajectory(model):
        sample(model)
        before = model.body.state.input.clone()
        sample(model, seed=1)  # time turns round, but this is one trajectory: at 0 bits the state stays
        assert_same_bits(model.body.state.input, before)
        attachment_of(model).automatic.end()
        assert attachment_of(model).clock.active
    assert not attachment_of(model).clock.active
    sample(model, seed=1)
    assert not torch.equal(model.body.state.input, before)


def test_a_network_without_time_steps_keeps_asking_for_a_trajectory():
    model = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(3)))
    modiff.apply(model)
    attachment_of(model).automatic = Automatic(attachment_of(model).clock)
    with pytest.raises(StateError, match="expected a running trajectory"):
        model(torch.randn(2, 16))


def test_packing_waits_for_no_trajectory_that_began_by_itself():
    model = automatic_toy()
    expected = sample(model)
    modiff.pack(model)
    for ours, theirs in zip(sample(model), expected, strict=True):
        assert_same_bits(ours, theirs)
