"""Frechet distance between two sets of features: how far apart two Gaussians of their moments are."""

from __future__ import annotations

import torch
from torch import Tensor

from modiff.errors import ConfigError
from modiff.evaluate.metrics.moments import Moments
from modiff.evaluate.metrics.rows import check_same_dimension

_NEGATIVE = 1e-6
"""An eigenvalue below minus this share of the largest is no rounding error."""


def frechet_distance(first: Moments, second: Moments) -> float:
    """|μ_a - μ_b|² + tr(Σ_a) + tr(Σ_b) - 2 tr((Σ_a Σ_b)^½), the squared 2-Wasserstein distance of two Gaussians.

    With Inception features this is the FID (Heusel et al. 2017, arXiv:1706.08500). Σ_a Σ_b is not symmetric, and its
    square root by Schur form comes out complex or infinite when a covariance is singular. Here instead

        tr((Σ_a Σ_b)^½) = ||Σ_a^½ Σ_b^½||_*        the sum of the singular values of the product of symmetric roots

    which is real by construction, needs no offset on the diagonal, and holds for singular covariances (fewer images
    than dimensions) too. Eigenvalues under D ε λ_max, the rounding error of the decomposition, count as 0.

    Units: those of the features, squared. Symmetric, 0 for equal moments, never negative.
    It is biased upwards by about c / n (see `small_sample_note`), so compare at equal n only.
    Raises: ConfigError for different dimensions, fewer than 2 images, or a covariance with negative eigenvalues.
    Cost: O(D³): two symmetric eigendecompositions and one set of singular values; seconds at D = 2048.

    >>> a, b = Moments.given(torch.zeros(1), torch.eye(1), 9), Moments.given(torch.ones(1), 4 * torch.eye(1), 9)
    >>> frechet_distance(a, b)  # (0 - 1)² + (1 - 2)²
    2.0
    """
    check_same_dimension(first.dimension, second.dimension, "frechet_distance")
    left, right = first.covariance(), second.covariance()
    root = torch.linalg.svdvals(symmetric_root(left) @ symmetric_root(right)).sum()
    delta = first.mean - second.mean
    distance = float(delta @ delta + left.trace() + right.trace() - 2 * root)
    return max(distance, 0.0)  # a squared distance; rounding leaves about -1e-13 for equal sets


def symmetric_root(covariance: Tensor) -> Tensor:
    """The symmetric positive semidefinite R with R R = covariance, (D, D) float64.

    Raises: ConfigError if an eigenvalue is negative beyond rounding.
    """
    values, vectors = torch.linalg.eigh(covariance)
    largest = float(values[-1].abs())
    if float(values[0]) < -_NEGATIVE * largest:
        raise ConfigError(
            "frechet_distance: expected a positive semidefinite covariance, got an eigenvalue "
            f"of {float(values[0]):.3g} beside {largest:.3g}. No set of images has such moments. Compute them again."
        )
    floor = len(values) * torch.finfo(torch.float64).eps * largest
    return (vectors * torch.where(values > floor, values, 0).sqrt()) @ vectors.T
