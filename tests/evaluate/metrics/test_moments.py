"""Running moments: against exact sums, in any batches and any order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modiff.errors import ConfigError
from modiff.evaluate.metrics.moments import Moments
from tests.evaluate.metrics.features import feature_sets
from tests.reference.metrics import mean_and_covariance


def equal(found: Moments, expected: Moments) -> None:
    assert found.count == expected.count
    scale = float(expected._scatter.abs().max()) + 1e-9
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found._scatter / scale, expected._scatter / scale, rtol=0, atol=1e-9)


def in_batches(rows: Tensor, cuts: list[int]) -> Moments:
    moments = Moments(rows.shape[1])
    for part in torch.tensor_split(rows, sorted(cuts)):
        moments.update(part)
    return moments


@given(feature_sets(), st.lists(st.integers(0, 12), max_size=4))
def test_any_batches_give_the_mean_and_covariance_of_exact_sums(rows: Tensor, cuts: list[int]) -> None:
    mean, covariance = mean_and_covariance(rows.tolist())
    found = in_batches(rows, cuts)
    spread = max(np.trace(covariance), 1e-20)
    assert found.count == len(rows)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-13, atol=1e-13 * float(rows.abs().max()))
    np.testing.assert_allclose(found.covariance() / spread, np.array(covariance) / spread, atol=1e-9)


@given(feature_sets(dimension=3), feature_sets(dimension=3), feature_sets(dimension=3))
def test_merging_is_associative_and_commutative(a: Tensor, b: Tensor, c: Tensor) -> None:
    def merged(*parts: Moments) -> Moments:
        whole = Moments(3)
        for part in parts:
            whole.merge(part)
        return whole

    x, y, z = Moments.of(a), Moments.of(b), Moments.of(c)
    equal(merged(merged(x, y), z), merged(x, merged(y, z)))
    equal(merged(x, y, z), merged(z, x, y))
    equal(merged(x, y, z), Moments.of(torch.cat([a, b, c])))


def test_merging_leaves_the_other_as_it_was_and_shares_nothing_with_it() -> None:
    first, second = Moments.of(torch.tensor([[1.0], [3.0]])), Moments.of(torch.tensor([[5.0], [9.0]]))
    whole = Moments(1)
    whole.merge(first)
    whole.merge(second)
    whole.update(torch.tensor([[100.0]]))
    assert (first.count, first.mean.item(), first.covariance().item()) == (2, 2.0, 2.0)
    assert (second.count, second.mean.item(), second.covariance().item()) == (2, 7.0, 8.0)


def test_an_empty_batch_changes_nothing() -> None:
    moments = Moments.of(torch.tensor([[1.0], [3.0]]))
    moments.update(torch.zeros(0, 1))
    moments.merge(Moments(1))
    assert (moments.count, moments.mean.item(), moments.covariance().item()) == (2, 2.0, 2.0)


def test_a_small_spread_far_from_zero_survives_many_batches() -> None:
    rows = torch.arange(1000, dtype=torch.float64)[:, None] % 2 * 1e-3 + 1e6  # variance 2.5e-7 at an offset of 1e6
    found = in_batches(rows, list(range(0, 1000, 7))).covariance().item()
    assert found == pytest.approx(2.5e-7 * 1000 / 999, rel=1e-4)


def test_float32_features_are_summed_in_float64() -> None:
    rows = torch.full((3, 1), 2.0**24, dtype=torch.float32)
    rows[0] = 1.0
    assert Moments.of(rows).mean.item() == (2**25 + 1) / 3


def test_given_moments_are_those_of_the_same_set() -> None:
    whole = Moments.of(torch.randn(9, 4, dtype=torch.float64))
    read = Moments.given(whole.mean.numpy(), whole.covariance().numpy(), 9)
    equal(read, whole)
    more = torch.randn(5, 4, dtype=torch.float64)
    for moments in (read, whole):
        moments.update(more)
    equal(read, whole)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Moments(0), "a dimension of 1 or more, got 0"),
        (lambda: Moments(3).update(torch.ones(2, 4)), "one dimension, got 3 and 4"),
        (lambda: Moments(3).merge(Moments(4)), "one dimension, got 3 and 4"),
        (lambda: Moments.of(torch.ones(1, 2)).covariance(), "2 or more vectors, got 1"),
        (lambda: Moments.given(torch.ones(2), torch.eye(3), 5), r"\(2,\) and \(3, 3\)"),
        (lambda: Moments.given(torch.ones(2), torch.eye(2), 1), "a count of 2 or more, got 1"),
        (lambda: Moments.given(torch.ones(2), torch.tensor([[1.0, 0.5], [0.4, 1.0]]), 5), "symmetric"),
    ],
)
def test_mistakes_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()
