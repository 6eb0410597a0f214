"""Two sets of features by kernels and by neighbours, and the Inception score of one set."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from modiff.config import check
from modiff.evaluate.metrics.frechet import check_same_dimension, feature_rows

CHUNK_BYTES = 64 * 2**20
"""Memory of distances at a time."""
_SUM = 1e-3
"""How far the probabilities of one image may be from 1 in total; float16 ones are within it."""


def kernel_distance(
    first: Tensor | np.ndarray,
    second: Tensor | np.ndarray,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Mean and standard deviation of `polynomial_mmd` over random subsets; with Inception features the KID.

    Subsets are drawn from each set (N, D) without replacement (arXiv:1801.01401). The deviation is that of one subset.
    Raises: ConfigError for different dimensions, sets smaller than a subset, subsets of fewer than 2, or several
        subsets of the full size, which would all be equal.
    Cost: subsets * 3 subset_size² D multiply-adds, 24 subset_size² bytes.
    """
    left, right = feature_rows(first, "kernel_distance"), feature_rows(second, "kernel_distance")
    smallest, largest = sorted((len(left), len(right)))
    fits = subsets > 0 and 2 <= subset_size <= smallest and (subset_size < largest or subsets == 1)
    expected = f"1 or more subsets of 2 to {smallest} vectors, and fewer vectors than {largest} in several"
    why = "They are drawn without replacement. Use smaller subsets, subsets=1, or more images."
    check("kernel_distance", (subsets, subset_size), fits, expected, why)
    generator = torch.Generator().manual_seed(seed)
    values = [
        polynomial_mmd(_subset(left, subset_size, generator), _subset(right, subset_size, generator))
        for _ in range(subsets)
    ]
    return float(np.mean(values)), float(np.std(values))


def polynomial_mmd(first: Tensor | np.ndarray, second: Tensor | np.ndarray) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy with k(x, y) = (xᵀy / D + 1)³:

        mean_{i≠j} k(x_i, x_j) + mean_{i≠j} k(y_i, y_j) - 2 mean_{i,j} k(x_i, y_j)

    Its expectation over sets of one distribution is 0, so it is often negative there.
    Raises: ConfigError for different dimensions or fewer than 2 vectors in a set.
    """
    left, right = feature_rows(first, "polynomial_mmd"), feature_rows(second, "polynomial_mmd")
    check_same_dimension(left.shape[1], right.shape[1], "polynomial_mmd")
    sizes, why = (len(left), len(right)), "The estimate averages over pairs. Give more images."
    check("polynomial_mmd", sizes, min(sizes) >= 2, "2 or more vectors in each set", why)
    return _among(left) + _among(right) - 2 * float(_kernel(left, right).mean())


def _kernel(left: Tensor, right: Tensor) -> Tensor:
    return (left @ right.T / left.shape[1] + 1) ** 3


def _among(rows: Tensor) -> float:
    kernel = _kernel(rows, rows)
    return float((kernel.sum() - kernel.trace()) / (len(rows) * (len(rows) - 1)))


def _subset(rows: Tensor, size: int, generator: torch.Generator) -> Tensor:
    return rows[torch.randperm(len(rows), generator=generator)[:size]]


def within_manifold(queries: Tensor | np.ndarray, manifold: Tensor | np.ndarray, *, neighbours: int = 3) -> Tensor:
    """Which queries (N, D) lie in a ball around a point of `manifold` (M, D): bool (N,).

    The ball of a point reaches to its k-th nearest other point, border included (arXiv:1904.06991; k = 3). Precision is
    the mean over generated images in the manifold of real ones, recall the mean over real images in that of generated
    ones; for their intervals resample these values, since resampled points would meet their own copies at distance 0.
    Raises: ConfigError for different dimensions.
    """
    points, rows = feature_rows(manifold, "within_manifold"), feature_rows(queries, "within_manifold")
    check_same_dimension(rows.shape[1], points.shape[1], "within_manifold")
    # k + 1: each point is its own nearest neighbour, at a distance of exactly 0
    radii = torch.cat([d.kthvalue(neighbours + 1, dim=1).values for d in _distances(points, points)])
    inside = [(d <= radii).any(1) for d in _distances(rows, points)]
    return torch.cat(inside) if inside else torch.zeros(0, dtype=torch.bool)


def _distances(left: Tensor, right: Tensor) -> Iterator[Tensor]:
    """Euclidean distances in blocks of rows. By differences: xx - 2xy + yy would not give 0 for equal vectors."""
    rows = max(CHUNK_BYTES // (8 * len(right)), 1)
    for first in range(0, len(left), rows):
        yield torch.cdist(left[first : first + rows], right, compute_mode="donot_use_mm_for_euclid_dist")


def inception_score(probabilities: Tensor | np.ndarray) -> float:
    """exp(mean_x KL(p(y|x) || p(y))), p(y) being the mean over all images (Salimans et al. 2016, arXiv:1606.03498).

    Of p(y|x) (N, K), rows that sum to 1; from 1 (all alike) to K (certain and even). Published scores are means over 10
    splits, which biases them downwards; this is one split.
    Raises: ConfigError if they are not probabilities, or there are none.
    """
    rows = feature_rows(probabilities, "inception_score")
    total = rows.sum(1)
    fits = len(rows) > 0 and float(rows.min()) >= 0 and float((total - 1).abs().max()) <= _SUM
    expected = "probabilities, at least 0 and with a sum of 1 in each row"
    check("inception_score", f"{len(rows)} rows that are not", fits, expected, "Give logits.softmax(1).")
    rows = rows / total[:, None]
    conditional = -torch.special.xlogy(rows, rows).sum(1).mean()
    marginal = rows.mean(0)
    return float((-torch.special.xlogy(marginal, marginal).sum() - conditional).exp())
