"""Count, mean and covariance of feature vectors, a batch at a time."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from modiff.errors import ConfigError
from modiff.evaluate.metrics.rows import as_rows, check_same_dimension

_SYMMETRY = 1e-8
"""How far a covariance read from a file may be from symmetric, as a share of its largest entry."""


class Moments:
    """Running count n, mean μ and scatter S = Σ (x - μ)(x - μ)ᵀ of vectors of length D, in float64.

    Batches and partial results are joined by (Chan, Golub and LeVeque 1979), with δ = μ_b - μ_a:

        n = n_a + n_b        μ = μ_a + δ n_b / n        S = S_a + S_b + δδᵀ n_a n_b / n

    so neither their sizes nor their order matters beyond rounding, and no large squares are subtracted.
    Memory: 8 D² bytes. Cost of n vectors: n D² multiply-adds.

    >>> moments = Moments(1)
    >>> moments.update(torch.tensor([[1.0], [3.0]]))
    >>> moments.update(torch.tensor([[8.0]]))
    >>> moments.count, moments.mean.item(), moments.covariance().item()
    (3, 4.0, 13.0)
    """

    def __init__(self, dimension: int) -> None:
        if type(dimension) is not int or dimension < 1:
            raise ConfigError(
                f"Moments: expected a dimension of 1 or more, got {dimension!r}. It is the length of the vectors. "
                "Give the extractor's dimension."
            )
        self.count = 0
        self.mean = torch.zeros(dimension, dtype=torch.float64)
        self._scatter = torch.zeros(dimension, dimension, dtype=torch.float64)

    @property
    def dimension(self) -> int:
        """Length D of the vectors."""
        return len(self.mean)

    @classmethod
    def of(cls, features: Tensor | np.ndarray) -> Moments:
        """Those of one set (N, D)."""
        rows = as_rows(features, "Moments")
        moments = cls(rows.shape[1])
        moments.update(rows)
        return moments

    @classmethod
    def given(cls, mean: Tensor | np.ndarray, covariance: Tensor | np.ndarray, count: int) -> Moments:
        """Those that someone else computed: mean (D,) and covariance (D, D), divided by count - 1.

        Raises: ConfigError if the shapes do not fit, the matrix is not symmetric, or count is below 2.
        """
        center, matrix = torch.as_tensor(mean), torch.as_tensor(covariance)
        if center.ndim != 1 or matrix.shape != (len(center), len(center)) or len(center) == 0:
            raise ConfigError(
                f"Moments: expected a mean (D,) and a covariance (D, D), got {tuple(center.shape)} and "
                f"{tuple(matrix.shape)}. They describe one set. Give both from one file."
            )
        if type(count) is not int or count < 2:
            raise ConfigError(
                f"Moments: expected a count of 2 or more, got {count!r}. A covariance needs two vectors. "
                "Give the number of images behind the statistics."
            )
        moments = cls(len(center))
        moments.mean = as_rows(center[None], "Moments")[0].clone()
        matrix = as_rows(matrix, "Moments")
        if float((matrix - matrix.T).abs().max()) > _SYMMETRY * float(matrix.abs().max()):
            raise ConfigError(
                "Moments: expected a symmetric covariance, got one that differs from its transpose. It is no "
                "covariance, or the file is damaged. Give the matrix of the same statistics file."
            )
        moments.count, moments._scatter = count, (matrix + matrix.T) * (0.5 * (count - 1))
        return moments

    def update(self, features: Tensor | np.ndarray) -> None:
        """Take in a batch (N, D); an empty one changes nothing. Raises: ConfigError for other shapes or NaN."""
        rows = as_rows(features, "Moments.update")
        check_same_dimension(self.dimension, rows.shape[1], "Moments.update")
        if len(rows):
            mean = rows.mean(0)
            centred = rows - mean
            self._join(len(rows), mean, centred.T @ centred)

    def merge(self, other: Moments) -> None:
        """Take in what `other` has seen; `other` stays as it is. Raises: ConfigError for another dimension."""
        check_same_dimension(self.dimension, other.dimension, "Moments.merge")
        if other.count:
            self._join(other.count, other.mean, other._scatter)

    def covariance(self) -> Tensor:
        """S / (n - 1), (D, D) float64. Raises: ConfigError below 2 vectors."""
        if self.count < 2:
            raise ConfigError(
                f"Moments.covariance: expected 2 or more vectors, got {self.count}. One has no spread. "
                "Give more images."
            )
        return self._scatter / (self.count - 1)

    def _join(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        delta = mean - self.mean
        self._scatter = self._scatter + scatter + torch.outer(delta, delta) * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total
