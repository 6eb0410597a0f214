"""The clock: evaluations per context, step size ratios, and who is told to forget."""

from __future__ import annotations

import pytest
import torch

from modiff import StateError
from modiff.nn import Clock
from modiff.nn.clock import middle


def test_steps_count_per_context_and_ticks_over_all():
    clock = Clock("model")
    clock.start()
    seen = []
    for name in ("cond", "uncond", "cond", "uncond", "cond"):
        clock.context = name
        clock.call(None)
        seen.append((clock.tick, clock.step))
    assert seen == [(1, 0), (2, 0), (3, 1), (4, 1), (5, 2)]


@pytest.mark.parametrize(
    "make", [float, lambda t: torch.tensor(t), lambda t: torch.full((4,), t), lambda t: torch.tensor([int(t)])]
)
def test_the_ratio_is_this_step_s_size_over_the_last_one_s(make):
    clock = Clock("model")
    clock.start()
    ratios = []
    for t in (999.0, 899.0, 849.0, 649.0):
        clock.call(make(t))
        ratios.append(float(clock.ratio))
    assert ratios == pytest.approx([1.0, 1.0, 0.5, 4.0])


def test_a_repeated_timestep_predicts_no_move_and_none_is_divided_by_zero():
    clock = Clock("model")
    clock.start()
    ratios = []
    for t in (10.0, 10.0, 8.0, 8.0, 6.0):
        clock.call(t)
        ratios.append(float(clock.ratio))
    assert ratios == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_without_timesteps_all_steps_are_alike():
    clock = Clock("model")
    clock.start()
    for t in (None, 5.0, None, 3.0):
        clock.call(t)
        assert clock.ratio == 1.0


def test_step_sizes_are_those_of_the_context():
    clock = Clock("model")
    clock.start()
    for t in (10.0, 8.0, 7.0):
        for name in ("a", "b"):
            clock.context = name
            clock.call(t)
    assert float(clock.ratio) == 0.5


def test_starting_and_stopping_frees_what_was_registered_and_counts_anew():
    clock, calls = Clock("model"), []
    clock.on_reset(lambda: calls.append(clock.active))
    clock.start()
    clock.call(1.0)
    clock.context = "cond"
    clock.stop()
    assert calls == [False, False]
    assert (clock.active, clock.context) == (False, "default")
    clock.start()
    clock.call(1.0)
    assert clock.step == 0


def test_a_call_outside_a_trajectory_is_not_counted():
    clock = Clock("model")
    clock.call(3.0)
    assert (clock.tick, clock.inside) == (0, False)


def test_the_network_is_inside_between_its_call_and_its_return():
    clock = Clock("model")
    clock.start()
    assert not clock.inside
    clock.call(None)
    assert clock.inside
    clock.returned()
    assert not clock.inside


def test_trajectories_of_one_model_cannot_nest():
    clock = Clock("UNet")
    clock.start()
    with pytest.raises(StateError, match=r"UNet: expected no running trajectory, got a second one"):
        clock.start()


def test_the_moment_is_the_timestep_of_the_evaluation_also_outside_of_a_trajectory():
    clock = Clock("model")
    for given, found in ((torch.tensor(981), 981.0), (torch.tensor([0.5, 0.5]), 0.5), (7.0, 7.0), (3, 3.0)):
        clock.call(given)
        assert clock.moment() == (found,)


def test_a_moment_needs_one_timestep_for_the_whole_batch():
    clock = Clock("model")
    clock.call(torch.tensor([5.0, 6.0]))
    with pytest.raises(StateError, match="expected one timestep for the whole batch, got several"):
        clock.moment()
    clock.call(None)
    with pytest.raises(StateError, match="expected one timestep for the whole batch, got none"):
        clock.moment()


def test_a_transition_is_the_last_two_timesteps_of_its_context():
    clock = Clock("model")
    clock.start()
    clock.call(10.0)
    with pytest.raises(StateError, match="expected a step before this one, got the first"):
        clock.transition()
    clock.call(7.0)
    assert clock.transition() == (7.0, 10.0)
    clock.context = "uncond"
    clock.call(6.0)
    clock.call(5.0)
    assert clock.transition() == (5.0, 6.0)


def test_tokens_with_timesteps_of_their_own_share_the_middle_one():
    clock, ratios = Clock("model"), []
    clock.start()
    for t in (1000.0, 900.0, 850.0):
        clock.call(torch.tensor([[0.0, 0.0, t, t, t]]))
        ratios.append(float(clock.ratio))
    assert ratios == [1.0, 1.0, 0.5]


@pytest.mark.parametrize("value", [0.1, 999.0, 1e-3, 7.3e8])
@pytest.mark.parametrize("count", [1, 3, 7])
def test_the_middle_of_equal_timesteps_is_theirs_to_the_bit(value, count):
    each = torch.full((count,), value)
    assert torch.equal(middle(each), each[:1])


def test_after_an_evaluation_that_raised_the_trajectory_is_over():
    clock = Clock("model")
    clock.start()
    clock.call(2.0)
    clock.raised()
    with pytest.raises(StateError, match="got one whose last evaluation raised"):
        clock.call(1.0)
    clock.stop()
    clock.start()
    clock.call(2.0)
    clock.returned()
    clock.call(1.0)


def test_an_evaluation_that_raised_outside_a_trajectory_spoils_none():
    clock = Clock("model")
    clock.call(2.0)
    clock.raised()
    clock.start()
    clock.call(2.0)
    assert clock.step == 0


def test_timesteps_are_kept_in_float32_whatever_torch_takes_by_default():
    clock = Clock("model")
    torch.set_default_dtype(torch.bfloat16)
    try:
        clock.start()
        for t in (1000.0, 999.0, 997.0):
            clock.call(t)
            clock.returned()
        assert float(clock.ratio) == 2.0
    finally:
        torch.set_default_dtype(torch.float32)


EVALUATIONS = {  # timesteps of the evaluations, and the branch of each
    "one": ([9, 6, 3, 0], [0, 0, 0, 0]),
    "tiles": ([9, 9, 9, 6, 6, 6, 3, 3, 3], [0, 1, 2, 0, 1, 2, 0, 1, 2]),
    "a sampler that visits timesteps twice": ([9, 6, 6, 3, 3, 0], [0] * 6),
    "the same with guidance in two calls": ([9, 9, 6, 6, 6, 6, 3, 3, 3, 3], [0, 1] * 5),
    "no timestep": ([None] * 4, [0] * 4),
}


@pytest.mark.parametrize("kind", EVALUATIONS)
def test_evaluations_at_one_timestep_are_branches_as_many_as_at_the_first(kind):
    clock, (times, branches) = Clock("model"), EVALUATIONS[kind]
    clock.numbered = True
    clock.start()
    seen = []
    for time in times:
        clock.call(time)
        seen.append((clock.context, clock.step))
        clock.returned()
        assert clock.context == "default"
    names = ["default" if branch == 0 else f"default #{branch}" for branch in branches]
    assert seen == [(name, names[:i].count(name)) for i, name in enumerate(names)]


def test_another_number_of_evaluations_at_a_timestep_warns_once():
    clock = Clock("model")
    clock.numbered = True
    clock.start()
    for time in (9, 9, 6):
        clock.call(time)
        clock.returned()
    with pytest.warns(UserWarning, match="expected as many evaluations at each timestep as at the first"):
        clock.call(3)
    clock.returned()
    clock.call(0)  # warnings are errors here


def test_the_first_timestep_after_others_begins_another_generation():
    clock, forgotten = Clock("model"), []
    clock.on_reset(lambda: forgotten.append(clock.tick))
    clock.numbered = True
    clock.start()
    for time in (9, 6, 3, 9, 6, 3):
        clock.call(time)
        clock.returned()
    assert forgotten == [0, 4]
    assert clock.step == 2


def test_evaluations_at_one_timestep_are_steps_where_the_host_does_not_number_them():
    clock = Clock("model")
    clock.start()
    for time in (9, 9):
        clock.call(time)
    assert (clock.context, clock.step) == ("default", 1)
