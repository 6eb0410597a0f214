"""The helpers fail where they must: on a wrong scale, a permutation, a NaN, another shape or dtype."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.helpers import assert_float_error, assert_same_bits, assert_within, drifting, worst

EXACT = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.25, -4.0]])
WRONG: dict[str, Tensor] = {
    "scale": EXACT * 1.01,
    "permutation": EXACT.flip(1),
    "NaN": EXACT.clone().index_put_((torch.tensor(1), torch.tensor(2)), torch.tensor(torch.nan)),
    "sign of one element": EXACT * torch.tensor([1.0, 1.0, -1.0]),
}
CHECKS: dict[str, Callable[[Tensor], None]] = {
    "assert_within": lambda x: assert_within(x, EXACT, 1e-3),
    "assert_within with a bound for each element": lambda x: assert_within(x, EXACT, torch.full_like(EXACT, 1e-3)),
    "assert_float_error": lambda x: assert_float_error(x, EXACT + 1e-4, EXACT),
    "assert_same_bits": lambda x: assert_same_bits(x, EXACT),
}


@pytest.mark.parametrize("check", CHECKS)
def test_a_check_passes_what_is_right(check: str) -> None:
    CHECKS[check](EXACT.clone())


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("check", CHECKS)
def test_a_check_fails_on_what_is_wrong(check: str, wrong: str) -> None:
    with pytest.raises(AssertionError):
        CHECKS[check](WRONG[wrong])


@pytest.mark.parametrize("check", CHECKS)
def test_a_check_fails_on_another_shape_even_if_it_broadcasts(check: str) -> None:
    with pytest.raises(AssertionError, match="shape"):
        CHECKS[check](EXACT[None])


def test_worst_is_the_largest_difference_and_infinite_for_nan() -> None:
    assert worst(EXACT + torch.tensor([0.0, 0.5, 0.25]), EXACT) == 0.5
    assert worst(WRONG["NaN"], EXACT) == float("inf")


def test_the_float_rule_allows_twice_the_error_of_torch_and_no_more() -> None:
    exact = torch.zeros(3)
    assert_float_error(exact + 2.0, exact + 1.0, exact)
    with pytest.raises(AssertionError, match="plain torch"):
        assert_float_error(exact + 2.5, exact + 1.0, exact)
    with pytest.raises(AssertionError, match="compared with"):
        assert_float_error(exact.half(), exact, exact)


def test_equal_values_of_another_dtype_are_not_the_same_bits() -> None:
    with pytest.raises(AssertionError, match=r"float64 instead of torch\.float32"):
        assert_same_bits(EXACT.double(), EXACT)


def test_drifting_inputs_keep_their_size_and_change_by_the_share_asked_for() -> None:
    inputs = drifting(0, (64, 64), steps=30, change=0.1)
    changes = [float((b - a).norm() / a.norm()) for a, b in itertools.pairwise(inputs)]
    assert all(0.09 < change < 0.11 for change in changes)
    assert all(0.95 < float(x.std()) < 1.05 for x in inputs)
    assert len(inputs) == 30
