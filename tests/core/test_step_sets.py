"""Finite sets of scales: who shares one, and no set for a step that was not calibrated."""

from __future__ import annotations

import pytest
import torch

from modiff import CalibrationError
from modiff.core.observers import MinMaxObserver
from modiff.core.step_sets import grouped, set_of


def watched(values: dict[float, float]) -> dict[tuple[float, ...], tuple[MinMaxObserver, ...]]:
    found = {}
    for timestep, largest in values.items():
        observer = MinMaxObserver()
        observer.observe(torch.tensor([-largest, largest]))
        found[(timestep,)] = (observer,)
    return found


def test_no_merging_keeps_a_set_for_each_moment_the_largest_timestep_first():
    sets, moments = grouped(watched({1.0: 0.1, 981.0: 5.0, 501.0: 2.0}), 0)
    assert moments == {(981.0,): 0, (501.0,): 1, (1.0,): 2}
    assert [sets[i][0].range()[1].item() for i in range(3)] == pytest.approx([5.0, 2.0, 0.1])


@pytest.mark.parametrize(("groups", "sizes"), [(1, [5]), (2, [3, 2]), (3, [2, 2, 1]), (5, [1] * 5), (9, [1] * 5)])
def test_groups_are_runs_of_neighbours_that_cover_the_largest_range_of_their_members(groups, sizes):
    values = {float(t): float(t) for t in (10, 20, 30, 40, 50)}
    sets, moments = grouped(watched(values), groups)
    members = [[t for (t,), i in moments.items() if i == index] for index in sorted(sets)]
    assert [len(m) for m in members] == sizes
    assert [t for m in members for t in m] == sorted(values, reverse=True)
    assert [sets[i][0].range()[1].item() for i in sorted(sets)] == [max(m) for m in members]


def test_a_moment_is_found_up_to_float32_rounding_and_no_further():
    moments = {(0.1,): 0, (999.0,): 1}
    assert set_of((float(torch.tensor(0.1)),), moments) == 0
    assert set_of((999.0,), moments) == 1
    for wrong in (998.0, 999.1, 0.101, 500.0):
        with pytest.raises(CalibrationError, match="expected a step of the 2 calibrated ones, timestep 999 to"):
            set_of((wrong,), moments)


def test_a_residual_after_another_step_size_is_another_moment():
    moments = {(900.0, 950.0): 0}
    assert set_of((900.0, 950.0), moments) == 0
    with pytest.raises(CalibrationError, match="got timestep 900 after 1000"):
        set_of((900.0, 1000.0), moments)
    with pytest.raises(CalibrationError, match="got timestep 900"):
        set_of((900.0,), moments)
