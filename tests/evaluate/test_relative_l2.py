"""Relative L2: the formula by hand, the float64 arithmetic, and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from modiff.errors import ConfigError
from modiff.evaluate.relative_l2 import relative_l2


def test_it_is_the_norm_of_the_difference_over_the_norm_of_the_reference() -> None:
    assert relative_l2(np.array([[0.0, 4.0], [0.0, 0.0]]), np.array([[3.0, 4.0], [0.0, 0.0]])) == 3 / 5


def test_tensors_and_arrays_of_any_real_dtype_mix() -> None:
    assert relative_l2(torch.tensor([3, 3], dtype=torch.uint8), np.array([3, 4], dtype=np.float16)) == 1 / 5


def test_it_is_not_symmetric_and_scales_with_neither_unit() -> None:
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0])
    assert relative_l2(x, y) == 0.5
    assert relative_l2(y, x) == 1.0
    assert relative_l2(255 * x, 255 * y) == 0.5


def test_small_differences_of_large_tensors_survive_since_it_computes_in_float64() -> None:
    reference = torch.full((1000, 1000), 1.0)
    value = reference.clone()
    value[0, 0] += 2**-20
    # one element of a million: 2**-20 / 1000, exact in float64, lost in a float32 sum of squares
    assert relative_l2(value, reference) == pytest.approx(2**-20 / 1000, rel=1e-12)


def test_a_permutation_and_a_nan_show() -> None:
    reference = torch.tensor([1.0, 2.0, 3.0])
    assert relative_l2(reference[[1, 2, 0]], reference) == pytest.approx(math.sqrt(6 / 14))
    assert math.isnan(relative_l2(torch.tensor([1.0, math.nan, 3.0]), reference))


@pytest.mark.parametrize(
    ("value", "reference", "message"),
    [
        (torch.ones(2, 3), torch.ones(3), r"got \(2, 3\) and \(3,\)"),
        (torch.ones(0), torch.ones(0), "at least one element"),
        (torch.ones(3), torch.zeros(3), "not zero"),
        (torch.ones(3, dtype=torch.complex64), torch.ones(3), "real values"),
    ],
)
def test_what_cannot_be_compared_is_an_error(value: torch.Tensor, reference: torch.Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        relative_l2(value, reference)
