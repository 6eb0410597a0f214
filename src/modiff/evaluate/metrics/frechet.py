"""Frechet distance between two sets of features: how far apart two Gaussians of their moments are."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from modiff.config import check
from modiff.evaluate.metrics.bootstrap import Draw, Interval, IntervalKind, bootstrap

CHANNELS = 7
"""Channels of a spatial row, the first ones: 7 * 17 * 17 = 2023 numbers of Inception, about as many as its averages."""


def feature_rows(value: Tensor | np.ndarray, where: str) -> Tensor:
    """Feature vectors (N, D) in float64 on the CPU, gradients cut.

    Raises: ConfigError if they are not two-dimensional, complex, NaN or infinite, or have no column.
    """
    rows = torch.as_tensor(value).detach()
    fits = rows.ndim == 2 and rows.shape[1] > 0 and not rows.is_complex()
    why = "Each row is one image. Flatten each image's features to one row."
    check(where, (tuple(rows.shape), rows.dtype), fits, "real feature vectors (N, D)", why)
    rows = rows.to("cpu", torch.float64)
    broken = int((~torch.isfinite(rows)).any(1).sum())
    why = "The images or the extractor are broken. Look at the images of these rows."
    check(where, f"NaN or infinity in {broken} of {len(rows)} rows", not broken, "finite features", why)
    return rows


def check_same_dimension(first: int, second: int, where: str) -> None:
    """Raise a ConfigError if the vectors of two sets have different lengths."""
    why = "Features of different extractors cannot be compared. Extract both sets with the same one."
    check(where, (first, second), first == second, "two sets of one dimension", why)


def spatial_rows(maps: Tensor) -> Tensor:
    """The first 7 channels of feature maps (N, C, H, W) at every position, one row an image: (N, min(C, 7) H W).

    A `frechet_distance` of them sees where things are. The convention of sFID (Nash et al. 2021, arXiv:2103.03841),
    whose maps are those of Inception's block Mixed_6d, branch 1x1, after its ReLU.
    """
    return maps[:, :CHANNELS].flatten(1)


class Moments:
    """Running count n, mean μ and scatter S = Σ (x - μ)(x - μ)ᵀ of vectors of length D, in float64.

    Batches are joined by (Chan, Golub and LeVeque 1979), with δ = μ_b - μ_a:

        n = n_a + n_b        μ = μ_a + δ n_b / n        S = S_a + S_b + δδᵀ n_a n_b / n

    so neither their sizes nor their order matters beyond rounding. Memory: 8 D² bytes.
    """

    def __init__(self, dimension: int) -> None:
        self.count = 0
        self.mean = torch.zeros(dimension, dtype=torch.float64)
        self.scatter = torch.zeros(dimension, dimension, dtype=torch.float64)

    @classmethod
    def of(cls, features: Tensor | np.ndarray) -> Moments:
        """Those of one set (N, D)."""
        rows = feature_rows(features, "Moments")
        moments = cls(rows.shape[1])
        moments.update(rows)
        return moments

    def update(self, features: Tensor | np.ndarray) -> None:
        """Take in a batch (N, D); an empty one changes nothing. Raises: ConfigError for other shapes or NaN."""
        rows = feature_rows(features, "Moments.update")
        check_same_dimension(len(self.mean), rows.shape[1], "Moments.update")
        if not len(rows):
            return
        total = self.count + len(rows)
        centred = rows - rows.mean(0)
        delta = rows.mean(0) - self.mean
        apart = torch.outer(delta, delta) * (self.count * len(rows) / total)
        self.scatter = self.scatter + centred.T @ centred + apart
        self.mean = self.mean + delta * (len(rows) / total)
        self.count = total

    def covariance(self) -> Tensor:
        """S / (n - 1), (D, D) float64. Raises: ConfigError below 2 vectors."""
        check("Moments.covariance", self.count, self.count >= 2, "2 or more vectors", "Give more images.")
        return self.scatter / (self.count - 1)


def frechet_distance(first: Moments, second: Moments) -> float:
    """|μ_a - μ_b|² + tr(Σ_a) + tr(Σ_b) - 2 tr((Σ_a Σ_b)^½), the squared 2-Wasserstein distance of two Gaussians.

    With Inception features this is the FID (arXiv:1706.08500). tr((Σ_a Σ_b)^½) = ||Σ_a^½ Σ_b^½||_*, the sum of the
    singular values of the product of symmetric roots, is real for singular covariances (fewer images than dimensions)
    too. Eigenvalues under D ε λ_max count as 0. It is biased upwards by about c / n (see `small_sample_note`).
    Raises: ConfigError for different dimensions, or fewer than 2 images. Cost: O(D³); seconds at D = 2048.
    """
    check_same_dimension(len(first.mean), len(second.mean), "frechet_distance")
    left, right = first.covariance(), second.covariance()
    root = torch.linalg.svdvals(_root(left) @ _root(right)).sum()
    delta = first.mean - second.mean
    distance = float(delta @ delta + left.trace() + right.trace() - 2 * root)
    return max(distance, 0.0)  # a squared distance; rounding leaves about -1e-13 for equal sets


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    floor = len(values) * torch.finfo(torch.float64).eps * values[-1].abs()
    return (vectors * torch.where(values > floor, values, 0).sqrt()) @ vectors.T


def frechet_interval(
    features: Tensor,
    reference: Tensor | Moments,
    *,
    resamples: int = 200,
    seed: int = 0,
    draw: Draw = "independent",
    kind: IntervalKind = "centred",
) -> Interval:
    """`frechet_distance` of features (N, D) to others (M, D), or to moments, which are not resampled, with an interval.

    The interval says where the distance of another n images of the same models would fall, at this n.

    draw: "paired" if row i of both comes from one seed: the biases cancel, and an unchanged model is at 0, so the value
        does not compare with one of independent seeds. kind: see `bootstrap`. Cost: resamples + 1 distances.
    """
    rows = feature_rows(features, "frechet_interval")
    samples = [rows] if isinstance(reference, Moments) else [rows, feature_rows(reference, "frechet_interval")]

    def distance(first: Tensor, second: Tensor | Moments = reference) -> float:
        return frechet_distance(Moments.of(first), second if isinstance(second, Moments) else Moments.of(second))

    return bootstrap(distance, samples, resamples=resamples, seed=seed, draw=draw, kind=kind)
