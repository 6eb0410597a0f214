"""Kernel distance, manifolds and Inception score: plain loops in float64, torchmetrics, closed forms, no bias."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modiff.errors import ConfigError
from modiff.evaluate.metrics import sets as module
from modiff.evaluate.metrics.sets import inception_score, kernel_distance, polynomial_mmd, within_manifold
from tests.evaluate.metrics.features import feature_sets, gaussian
from tests.reference import metrics as reference

ZERO, ONE = torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)


@given(feature_sets(dimension=3), feature_sets(dimension=3))
def test_the_discrepancy_agrees_with_plain_loops_and_is_symmetric(first: Tensor, second: Tensor) -> None:
    expected = reference.polynomial_mmd(first.tolist(), second.tolist())
    largest = max(float(rows.square().sum(1).max()) for rows in (first, second))
    size = (largest / 3 + 1) ** 3  # of the kernel's values, which cancel
    assert polynomial_mmd(first, second) == pytest.approx(expected, rel=1e-9, abs=1e-11 * size)
    assert polynomial_mmd(second, first) == pytest.approx(expected, rel=1e-9, abs=1e-11 * size)


def test_subsets_are_seeded_without_replacement_and_centre_on_the_estimate_of_everything() -> None:
    first, second = gaussian(0, 60, ZERO, ONE), gaussian(1, 80, ZERO + 0.5, ONE)
    mean, std = kernel_distance(first, second, subsets=300, subset_size=20, seed=4)
    assert (mean, std) == kernel_distance(first, second, subsets=300, subset_size=20, seed=4)
    assert mean != kernel_distance(first, second, subsets=300, subset_size=20, seed=5)[0]
    assert mean == pytest.approx(polynomial_mmd(first, second), abs=4 * std / np.sqrt(300))
    # 59 of 60 different vectors: with replacement about 37 % would be missing and the std would be far larger
    assert 0 < kernel_distance(first, second[:60], subsets=50, subset_size=59)[1] < std / 5


@given(feature_sets(dimension=2, smallest=1), feature_sets(dimension=2, smallest=5), st.integers(1, 4))
def test_membership_agrees_with_plain_loops(queries: Tensor, manifold: Tensor, neighbours: int) -> None:
    # Whole numbers, whose squared distances are exact: a border is met or missed by both.
    queries, manifold = queries.round().clamp(-50, 50), manifold.round().clamp(-50, 50)
    expected = reference.within_manifold(queries.tolist(), manifold.tolist(), neighbours)
    assert within_manifold(queries, manifold, neighbours=neighbours).tolist() == expected


def test_distances_are_exact_and_any_chunk_of_memory_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    points = torch.randn(40, 6, dtype=torch.float64) + 1e4  # products would cancel here
    assert not within_manifold(points + 1e-6, points.repeat(5, 1)).any()  # four copies: every radius is 0
    assert within_manifold(points, points.repeat(5, 1)).all()
    real, made = torch.randn(23, 6), torch.randn(31, 6) * 1.2
    whole = within_manifold(made, real)
    for size in (1, 8 * 23, 5 * 8 * 23):
        monkeypatch.setattr(module, "CHUNK_BYTES", size)
        assert torch.equal(within_manifold(made, real), whole)
    assert 0 < int(whole.sum()) < 31


@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(2, 6))
def test_the_score_agrees_with_plain_loops_in_any_order(seed: int, count: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = (3 * torch.randn(count, classes, generator=generator, dtype=torch.float64)).softmax(1)
    (expected,) = reference.inception_score(rows.tolist(), 1)
    assert inception_score(rows) == pytest.approx(expected, rel=1e-12)
    assert inception_score(rows[torch.randperm(count)]) == pytest.approx(expected, rel=1e-12)


def test_mistakes_are_refused() -> None:
    ones = torch.ones(10, 3)
    for other, subsets, size in ((torch.ones(12, 3), 100, 11), (ones, 0, 5), (ones, 100, 10)):
        with pytest.raises(ConfigError, match=rf"2 to 10 vectors.* got \({subsets}, {size}\)"):
            kernel_distance(ones, other, subsets=subsets, subset_size=size)
    with pytest.raises(ConfigError, match=r"2 or more vectors in each set, got \(1, 10\)"):
        polynomial_mmd(ones[:1], ones)
    for metric in (polynomial_mmd, within_manifold):
        with pytest.raises(ConfigError, match=r"one dimension, got \(3, 4\)"):
            metric(ones, torch.ones(10, 4))
    for rows in (torch.randn(4, 3), torch.full((4, 3), 0.3), torch.zeros(0, 3)):
        with pytest.raises(ConfigError, match="expected probabilities"):
            inception_score(rows)
