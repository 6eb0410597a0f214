"""When there are too few images for a metric, and what that does to its value."""

from __future__ import annotations

from typing import Literal

from modiff.errors import ConfigError

Metric = Literal["frechet_distance", "kernel_distance", "inception_score", "precision_recall", "mean"]

FRECHET_IMAGES = 2048
MANIFOLD_IMAGES = 10_000
MEAN_IMAGES = 30


def small_sample_note(metric: Metric, count: int, size: int = 1) -> str | None:
    """One sentence on what too few images do to a metric, or None if there are enough.

    metric              count: images in    size                     enough                 otherwise
    frechet_distance    the smaller set     D, length of a vector    2048, and more than D  biased upwards
    kernel_distance     the smaller set     images in a subset       2 subsets              std too small
    inception_score     one split           K, number of classes     4 (K - 1)              biased downwards
    precision_recall    the smaller set     unused                   10 000                 depends on n
    mean                the set             unused                   30                     interval too narrow

    Frechet: for two sets of n from one Gaussian with covariance σ² I, E[distance] ≈ σ² D (D + 5) / (2 n) when n is much
    larger than D: it falls as 1 / n and grows as D² (Chong and Forsyth 2020, arXiv:1911.07023, find the 1 / n).
    Inception score: the entropy of a mean over n images is too low by about (K - 1) / (2 n) at most (Miller 1955).
    Raises: ConfigError for an unknown metric.

    >>> small_sample_note("mean", 30) is None
    True
    """
    if metric == "frechet_distance":
        return _frechet(count, size)
    if metric == "kernel_distance" and count < 2 * size:
        return (
            f"{count} images for subsets of {size}: they overlap, so the std over subsets is too small. "
            "The mean is unbiased."
        )
    if metric == "inception_score" and count < 4 * (size - 1):
        return (
            f"{count} images in a split for {size} classes: the score may be too low by up to "
            f"{100 * (size - 1) / (2 * count):.0f} %."
        )
    if metric == "precision_recall" and count < MANIFOLD_IMAGES:
        return f"{count} images: precision and recall depend on n; published ones use {MANIFOLD_IMAGES} or more."
    if metric == "mean" and count < MEAN_IMAGES:
        return f"{count} images: a bootstrap interval of fewer than {MEAN_IMAGES} is too narrow."
    if metric not in ("kernel_distance", "inception_score", "precision_recall", "mean"):
        raise ConfigError(
            "small_sample_note: expected frechet_distance, kernel_distance, inception_score, precision_recall or mean, "
            f"got {metric!r}. Each needs a number of images of its own. Use one of these."
        )
    return None


def _frechet(count: int, dimension: int) -> str | None:
    if count <= dimension:
        return (
            f"{count} images for {dimension} dimensions: the covariance is singular, and the distance is mostly bias. "
            "It is comparable only with others at the same n."
        )
    if count < FRECHET_IMAGES:
        return (
            f"{count} images: the distance is biased upwards by an amount that falls as 1/n. Published ones use "
            "50 000; compare at the same n only."
        )
    return None
