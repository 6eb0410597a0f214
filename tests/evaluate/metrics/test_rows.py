"""Sets of features: what is taken, and what is refused with a reason."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from modiff.errors import ConfigError
from modiff.evaluate.metrics.rows import as_rows, check_same_dimension


def test_any_real_dtype_becomes_float64_without_a_gradient() -> None:
    half = torch.tensor([[1.0, 2.0]], dtype=torch.float16, requires_grad=True)
    for value in (np.array([[1, 2]], dtype=np.uint8), half):
        rows = as_rows(value, "here")
        assert rows.dtype == torch.float64
        assert rows.tolist() == [[1.0, 2.0]]
        assert not rows.requires_grad


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(3), r"here: expected real feature vectors \(N, D\), got \(3,\)"),
        (torch.ones(3, 0), r"got \(3, 0\)"),
        (torch.ones(2, 2, dtype=torch.complex64), "complex64"),
        (torch.tensor([[1.0, math.nan], [1.0, 1.0], [math.inf, 1.0]]), "NaN or infinity in 2 of 3 rows"),
    ],
)
def test_what_is_no_set_of_features_is_an_error(value: torch.Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        as_rows(value, "here")


def test_sets_of_two_extractors_are_told_apart() -> None:
    check_same_dimension(3, 3, "here")
    with pytest.raises(ConfigError, match="here: expected two sets of one dimension, got 3 and 4"):
        check_same_dimension(3, 4, "here")
