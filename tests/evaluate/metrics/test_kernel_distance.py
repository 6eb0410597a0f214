"""Kernel distance: plain loops, torchmetrics, no bias, subsets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torchmetrics.image.kid import KernelInceptionDistance

from modiff.errors import ConfigError
from modiff.evaluate.metrics.kernel_distance import kernel_distance, polynomial_mmd
from tests.evaluate.metrics.features import feature_sets, gaussian
from tests.reference import metrics as reference

ZERO, ONE = torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)


@given(feature_sets(dimension=3), feature_sets(dimension=3))
def test_the_estimate_agrees_with_plain_loops_and_is_symmetric(first: Tensor, second: Tensor) -> None:
    expected = reference.polynomial_mmd(first.tolist(), second.tolist())
    largest = max(float(rows.square().sum(1).max()) for rows in (first, second))
    size = (largest / 3 + 1) ** 3  # of the kernel's values, which cancel
    assert polynomial_mmd(first, second) == pytest.approx(expected, rel=1e-9, abs=1e-11 * size)
    assert polynomial_mmd(second, first) == pytest.approx(expected, rel=1e-9, abs=1e-11 * size)


def test_sets_of_one_distribution_are_at_0_on_average_with_negative_values_among_them() -> None:
    found = [polynomial_mmd(gaussian(2 * i, 10, ZERO, ONE), gaussian(2 * i + 1, 10, ZERO, ONE)) for i in range(800)]
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found)) < 3 * error
    assert min(found) < 0 < max(found)
    assert error < 0.05  # so that the biased estimate, 0.9 at this size, would not pass


def test_its_mean_does_not_depend_on_the_size_of_the_sets() -> None:
    def mean(size: int, count: int) -> float:
        pairs = [(gaussian(2 * i, size, ZERO, ONE), gaussian(2 * i + 1, size, ZERO + 1, ONE)) for i in range(count)]
        return float(np.mean([polynomial_mmd(a, b) for a, b in pairs]))

    assert mean(8, 600) == pytest.approx(mean(100, 60), rel=0.1)


def test_shifted_constants_have_the_closed_form() -> None:
    # k(0, 0) = 1, k(2, 2) = (4 + 1)³, k(0, 2) = 1
    assert polynomial_mmd(torch.zeros(4, 5), torch.full((3, 5), 2.0)) == pytest.approx(1 + 125 - 2)


class Pixels(nn.Module):
    """Hands its images on as features."""

    num_features = 3

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


@pytest.mark.filterwarnings("ignore:Metric .Kernel Inception Distance. will save all:UserWarning")
def test_one_subset_of_everything_agrees_with_torchmetrics() -> None:
    first, second = gaussian(0, 30, ZERO, ONE), gaussian(1, 30, ZERO + 0.5, 2 * ONE)
    theirs = KernelInceptionDistance(feature=Pixels(), subsets=1, subset_size=30, normalize=True)
    theirs = theirs.set_dtype(torch.float64)
    theirs.update(first.view(-1, 1, 1, 3), real=True)
    theirs.update(second.view(-1, 1, 1, 3), real=False)
    found = kernel_distance(first, second, subsets=1, subset_size=30)
    assert found["mean"] == pytest.approx(float(theirs.compute()[0]), rel=1e-9)
    assert found == {"mean": pytest.approx(polynomial_mmd(first, second)), "std": 0, "subsets": 1, "subset_size": 30}


def test_subsets_are_seeded_without_replacement_and_centre_on_the_estimate_of_everything() -> None:
    first, second = gaussian(0, 60, ZERO, ONE), gaussian(1, 80, ZERO + 0.5, ONE)
    found = kernel_distance(first, second, subsets=300, subset_size=20, seed=4)
    assert found == kernel_distance(first, second, subsets=300, subset_size=20, seed=4)
    assert found["mean"] != kernel_distance(first, second, subsets=300, subset_size=20, seed=5)["mean"]
    assert found["mean"] == pytest.approx(polynomial_mmd(first, second), abs=4 * found["std"] / np.sqrt(300))
    assert found["std"] > 0
    # 59 of 60 different vectors: with replacement about 37 % would be missing and the std would be far larger
    nearly = kernel_distance(first, second[:60], subsets=50, subset_size=59)
    assert nearly["std"] < found["std"] / 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"subset_size": 11}, "subset_size of 2 to 10 for sets of 10 and 12, got 11"),
        ({"subset_size": 1}, "got 1"),
        ({"subsets": 0, "subset_size": 5}, "1 or more subsets, got 0"),
    ],
)
def test_subsets_that_cannot_be_drawn_are_an_error(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kernel_distance(torch.ones(10, 3), torch.ones(12, 3), **settings)


def test_many_equal_subsets_other_dimensions_and_single_images_are_errors() -> None:
    with pytest.raises(ConfigError, match="got 100 of the full size"):
        kernel_distance(torch.ones(10, 3), torch.ones(10, 3), subset_size=10)
    with pytest.raises(ConfigError, match="one dimension, got 3 and 4"):
        kernel_distance(torch.ones(10, 3), torch.ones(10, 4), subset_size=5)
    with pytest.raises(ConfigError, match="2 or more vectors in each set, got 1 and 4"):
        polynomial_mmd(torch.ones(1, 3), torch.ones(4, 3))
