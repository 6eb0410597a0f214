"""The clock: evaluations per context, step size ratios, branches, and who is told to forget."""

import pytest
import torch

from modiff import StateError
from modiff.nn import Clock
from modiff.nn.clock import middle


@pytest.fixture
def clock() -> Clock:
    """Of a model in a trajectory."""
    clock = Clock("UNet")
    clock.start()
    return clock


def test_steps_count_per_context_and_ticks_over_all(clock):
    seen = []
    for i, t in enumerate((10.0, 10.0, 8.0, 8.0, 7.0, 7.0)):
        clock.context = ("cond", "uncond")[i % 2]
        clock.call(t)
        seen.append((clock.tick, clock.step, float(clock.ratio)))
    assert seen == [(1, 0, 1), (2, 0, 1), (3, 1, 1), (4, 1, 1), (5, 2, 0.5), (6, 2, 0.5)]


FORMS = [
    float, torch.tensor, lambda t: torch.full((4,), t), lambda t: torch.tensor([int(t)]),
    lambda t: torch.tensor([[0.0, 0.0, 2 * t, 2 * t]]),  # image-to-video: tokens of the first frame stay at 0
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("times", "ratios"), [
    ((999.0, 899.0, 849.0, 649.0), [1.0, 1.0, 0.5, 4.0]),
    ((10.0, 10.0, 8.0, 8.0, 6.0), [1.0, 1.0, 0.0, 0.0, 0.0]),  # nothing is divided by zero
    ((None, 5.0, None, 3.0), [1.0] * 4),
])  # fmt: skip
def test_the_ratio_is_this_step_s_size_over_the_last_one_s(clock, form, times, ratios):
    seen = []
    for t in times:
        clock.call(None if t is None else form(t))
        seen.append(float(clock.ratio))
    assert seen == pytest.approx(ratios)


def test_timesteps_are_kept_in_float32_whatever_torch_takes_by_default(clock):
    torch.set_default_dtype(torch.bfloat16)
    try:
        for t in (1000.0, 999.0, 997.0):
            clock.call(t)
        assert float(clock.ratio) == 2.0
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("value", [0.1, 999.0, 1e-3, 7.3e8])
def test_the_middle_of_equal_timesteps_is_theirs_to_the_bit(value):
    for count in (1, 3, 7):
        assert torch.equal(middle(torch.full((count,), value)), torch.full((1,), value))


def test_the_network_is_inside_between_its_call_and_its_return_and_one_that_raised_ends_the_trajectory():
    clock = Clock("model")
    clock.call(3.0)
    clock.raised()  # outside of a trajectory: spoils none
    assert (clock.tick, clock.inside) == (1, False)
    for _ in range(2):
        clock.start()
        assert not clock.inside
        clock.call(None)
        assert (clock.step, clock.inside) == (0, True)
        clock.returned()
        assert not clock.inside
        clock.call(2.0)
        clock.raised()
        with pytest.raises(StateError, match="got one whose last evaluation raised"):
            clock.call(1.0)
        clock.stop()


@pytest.mark.parametrize(
    ("times", "starts"),
    [
        ([500, 0, 750, 500, 250, 0, 830, 664], [0, 2, 6]),  # FreeInit: more steps each time
        ([0.0, 0.5, -0.2, 0.3], [0, 2]),  # upwards
        ([999, 500, 750, 250], [0, 2]),  # from the middle, of another schedule
        ([999, 888, 811.9, 812, 812, 735, 8.66, 9, 0.2], [0]),  # an ancestral sampler that rounds
        ([960, 920, 880, 960, 920, 880, 840, 920, 880, 840, 800, 880, 840], [0, 3]),  # RePaint goes back
        ([999, 1000, 980, 1000, 500, 1000, 0, 1000], [0]),  # UniDiffuser's other branch stays at the end
        ([None, None, None], [0]),
    ],
)
def test_a_timestep_far_back_that_did_not_come_before_begins_another_generation(clock, times, starts):
    clock.numbered, seen = True, []
    for i, time in enumerate(times):
        clock.call(time)
        seen += [i] * (clock.step == 0)
        clock.returned()
    assert seen == starts


def test_another_number_of_evaluations_at_a_timestep_warns_once_and_the_first_timestep_begins_another_generation(
    clock, monkeypatch
):
    monkeypatch.setattr("modiff.errors._WARNED", set())
    forgotten = []
    clock.on_reset(lambda: forgotten.append(clock.tick))
    clock.numbered = True
    for time in (9, 9, 6):
        clock.call(time)
        clock.returned()
    with pytest.warns(UserWarning, match="expected as many evaluations at each timestep as at the first"):
        clock.call(3)
    clock.returned()
    for time in (0, 9, 6):  # warnings are errors here
        clock.call(time)
        clock.returned()
    assert forgotten == [6]
    assert clock.step == 1
