"""Frechet distance: moments in any batches, closed forms, torchmetrics, singular covariances, small sets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modiff.errors import ConfigError
from modiff.evaluate.metrics.bootstrap import bootstrap
from modiff.evaluate.metrics.frechet import Moments, feature_rows, frechet_distance, frechet_interval
from tests.evaluate.metrics.features import feature_sets, gaussian, rotation
from tests.reference import metrics as reference

ZERO, ONE = torch.zeros(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
ROTATION = rotation(1, 4)


def moments(mean: Tensor, covariance: Tensor) -> Moments:
    """Those of a distribution."""
    known = Moments(len(mean))
    known.count, known.mean, known.scatter = 2, mean, covariance
    return known


def diagonal(*values: float) -> Tensor:
    return torch.diag(torch.tensor(values, dtype=torch.float64))


def distance(first: Tensor, second: Tensor) -> float:
    return frechet_distance(Moments.of(first), Moments.of(second))


@given(feature_sets(), st.lists(st.integers(0, 12), max_size=4))
def test_any_batches_give_the_mean_and_covariance_of_exact_sums(rows: Tensor, cuts: list[int]) -> None:
    mean, covariance = reference.mean_and_covariance(rows.tolist())
    moments = Moments(rows.shape[1])
    for batch in torch.tensor_split(rows, sorted(cuts)):
        moments.update(batch)
    spread = max(np.trace(covariance), 1e-20)
    assert moments.count == len(rows)
    np.testing.assert_allclose(moments.mean, mean, rtol=1e-13, atol=1e-13 * float(rows.abs().max()))
    np.testing.assert_allclose(moments.covariance() / spread, np.array(covariance) / spread, atol=1e-9)


@pytest.mark.parametrize("turn", [torch.eye(4, dtype=torch.float64), ROTATION])
def test_gaussians_with_common_axes_are_apart_by_their_means_and_standard_deviations(turn: Tensor) -> None:
    mean = torch.tensor([1.0, -2.0, 0.0, 0.5], dtype=torch.float64)
    first = moments(ZERO, turn @ diagonal(1, 4, 9, 16) @ turn.T)
    second = moments(turn @ mean, turn @ diagonal(9, 4, 1, 0.25) @ turn.T)
    # |mean|² + (1 - 3)² + (2 - 2)² + (3 - 1)² + (4 - 0.5)²
    assert frechet_distance(first, second) == pytest.approx(5.25 + 4 + 0 + 4 + 12.25, rel=1e-12)


@given(feature_sets(dimension=3, smallest=8), feature_sets(dimension=3, smallest=8))
def test_it_is_symmetric_positive_and_0_only_for_equal_moments(first: Tensor, second: Tensor) -> None:
    a, b = Moments.of(first), Moments.of(second)
    size = float(a.covariance().trace() + b.covariance().trace()) + float((a.mean - b.mean) @ (a.mean - b.mean))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9, abs=1e-6 * size)
    assert 0 <= frechet_distance(a, a) <= 1e-6 * size
    moved = Moments.of(first + 1)
    assert frechet_distance(a, moved) == pytest.approx(3, rel=1e-6, abs=1e-6 * size)


def test_it_agrees_with_an_iteration_on_the_product_itself() -> None:
    first = gaussian(0, 12, ZERO[:3], ONE[:3, :3])
    second = gaussian(1, 15, ZERO[:3] + 0.5, diagonal(0.3, 2, 1))
    expected = reference.frechet_distance(first.tolist(), second.tolist())
    assert distance(first, second) == pytest.approx(expected, rel=1e-9)


def test_fewer_images_than_dimensions_give_the_distance_within_the_space_they_span() -> None:
    # three vectors in the plane, then turned into 40 dimensions: distances do not change, covariances become singular
    plane, other = torch.randn(3, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64) * 2 + 1
    frame = rotation(5, 40)[:, :2]
    assert distance(plane @ frame.T, other @ frame.T) == pytest.approx(distance(plane, other), rel=1e-6)


def test_the_estimate_is_the_distance_and_lies_inside_while_plain_percentiles_lie_above() -> None:
    zero, one = torch.zeros(20, dtype=torch.float64), torch.eye(20, dtype=torch.float64)
    first, second = gaussian(0, 100, zero, one), gaussian(1, 100, zero, one)  # most of it is bias: 20 * 25 / 200
    interval = frechet_interval(first, second, resamples=60, seed=2)
    plain = bootstrap(distance, [first, second], resamples=60, seed=2)
    assert interval["estimate"] == pytest.approx(distance(first, second), rel=1e-12)
    assert interval["low"] < interval["estimate"] < interval["high"]
    assert plain["low"] > interval["estimate"]
    assert interval["high"] - interval["low"] == pytest.approx(plain["high"] - plain["low"])


def test_the_same_seeds_lower_the_distance_and_an_unchanged_model_is_at_0_only_with_them() -> None:
    rows, other = gaussian(0, 50, ZERO, ONE), gaussian(1, 50, ZERO, ONE)
    same = frechet_interval(rows, rows.clone(), resamples=10, draw="paired")
    assert max(abs(same[key]) for key in ("estimate", "low", "high")) < 1e-10
    apart = frechet_interval(rows, rows.clone(), resamples=10)
    assert apart["high"] - apart["low"] > 1e-3
    assert frechet_interval(rows, other, resamples=10)["estimate"] == pytest.approx(4 * 9 / 100, rel=0.5)


def test_mistakes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"here: expected real feature vectors \(N, D\), got \(\(3,\)"):
        feature_rows(torch.ones(3), "here")
    with pytest.raises(ConfigError, match="NaN or infinity in 2 of 3 rows"):
        feature_rows(torch.tensor([[math.nan], [1], [math.inf]]), "here")
    with pytest.raises(ConfigError, match=r"one dimension, got \(3, 4\)"):
        Moments(3).update(torch.ones(2, 4))
    with pytest.raises(ConfigError, match="2 or more vectors, got 1"):
        distance(torch.ones(4, 2), torch.ones(1, 2))
