"""Precision and recall: are the images plausible, and are all kinds of images there?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from modiff.errors import ConfigError
from modiff.evaluate.metrics.rows import as_rows, check_same_dimension

CHUNK_BYTES = 64 * 2**20
"""Distances held at once."""


class PrecisionRecall(TypedDict):
    """Shares from 0 to 1, and the number of neighbours that they depend on."""

    precision: float
    recall: float
    neighbours: int


def precision_recall(
    generated: Tensor | np.ndarray, real: Tensor | np.ndarray, *, neighbours: int = 3
) -> PrecisionRecall:
    """The share of each set that lies within the other's manifold (Kynkäänniemi et al. 2019, arXiv:1904.06991).

    precision = share of generated images inside the manifold of the real ones; recall = the other way round.
    Both depend on the set sizes: the published ones use equal sizes (50 000; 10 000 real ones in the ADM suite).

    Args:
        generated, real: features (N, D) and (M, D).
        neighbours: k of the manifolds; 3 as published.
    Raises: ConfigError for different dimensions, or a set with no more than k vectors.
    Cost: (N² + M² + 2 N M) D; memory is bounded by CHUNK_BYTES of distances.

    >>> line = torch.arange(5.0)[:, None]
    >>> precision_recall(line[:4], line + 0.5, neighbours=1)
    {'precision': 1.0, 'recall': 0.8, 'neighbours': 1}
    """
    return {
        "precision": float(within_manifold(generated, real, neighbours=neighbours).double().mean()),
        "recall": float(within_manifold(real, generated, neighbours=neighbours).double().mean()),
        "neighbours": neighbours,
    }


def within_manifold(queries: Tensor | np.ndarray, manifold: Tensor | np.ndarray, *, neighbours: int = 3) -> Tensor:
    """Which queries (N, D) lie in a ball around a point of `manifold` (M, D): bool (N,).

    The ball of a point reaches to its k-th nearest other point, border included. For an interval of precision or
    recall, resample these values with `bootstrap`: resampled points would meet their own copies at distance 0.
    Raises, cost: as for `precision_recall`.
    """
    points, asked = as_rows(manifold, "precision_recall"), as_rows(queries, "precision_recall")
    check_same_dimension(asked.shape[1], points.shape[1], "precision_recall")
    if type(neighbours) is not int or not 1 <= neighbours < len(points):
        raise ConfigError(
            f"precision_recall: expected 1 to {len(points) - 1} neighbours in a set of {len(points)}, got "
            f"{neighbours!r}. Each point needs as many others. Use neighbours=3 and more images."
        )
    # k + 1: each point is its own nearest neighbour, at a distance of exactly 0
    radii = torch.cat([d.kthvalue(neighbours + 1, dim=1).values for d in _distances(points, points)])
    inside = [(d <= radii).any(1) for d in _distances(asked, points)]
    return torch.cat(inside) if inside else torch.zeros(0, dtype=torch.bool)


def _distances(left: Tensor, right: Tensor) -> Iterator[Tensor]:
    """Euclidean distances in blocks of rows. By differences: xx - 2xy + yy would not give 0 for equal vectors."""
    rows = max(CHUNK_BYTES // (8 * len(right)), 1)
    for first in range(0, len(left), rows):
        yield torch.cdist(left[first : first + rows], right, compute_mode="donot_use_mm_for_euclid_dist")
