"""Confidence intervals by resampling the images, and what too few images do to a figure."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Literal, TypedDict

import numpy as np
import torch
from torch import Tensor

from modiff.config import check

Draw = Literal["independent", "paired"]
IntervalKind = Literal["percentile", "centred", "normal"]

FRECHET_IMAGES, MANIFOLD_IMAGES, MEAN_IMAGES = 2048, 10_000, 30


class Interval(TypedDict):
    """A figure and its interval, ready for JSON. An end, or the figure itself, is None where it is infinite."""

    estimate: float | None
    low: float | None
    high: float | None
    level: float
    resamples: int


def bootstrap(
    statistic: Callable[..., float | Tensor],
    samples: Sequence[Tensor],
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    draw: Draw = "independent",
    kind: IntervalKind = "percentile",
) -> Interval:
    """The statistic of the samples, and the range of `level` of its values over resampled images (Efron 1979).

    Args:
        statistic: takes one tensor for each sample and gives a finite number.
        samples: tensors whose rows are images.
        draw: "independent" draws from each sample as many rows as it has, with replacement; "paired" the same rows from
            all of them, for samples whose rows come from the same seeds.
        kind: "percentile" takes quantiles of the values. "centred" shifts these so that their mean lies on the
            estimate: a Frechet distance grows when images repeat, so that the plain interval may miss it. "normal" uses
            their standard deviation, for a few tens of resamples; a single value has none, and both ends are None.
    Raises: ConfigError for empty samples, pairs of unequal length, or a statistic that is not finite.
    Cost: resamples + 1 evaluations of the statistic.

    >>> bootstrap(lambda x: float(x.mean()), [torch.zeros(5, 1)], resamples=10)
    {'estimate': 0.0, 'low': 0.0, 'high': 0.0, 'level': 0.95, 'resamples': 10}
    """
    lengths = [len(sample) for sample in samples]
    fits = bool(lengths) and min(lengths) > 0 and resamples > 0 and (draw != "paired" or len(set(lengths)) == 1)
    expected = "samples with images, of equal lengths if they are paired, and 1 or more resamples"
    why = "There is nothing to draw. Give a tensor with a row for each image, and resamples=1000."
    check("bootstrap", (lengths, draw, resamples), fits, expected, why)
    generator = torch.Generator().manual_seed(seed)
    estimate, values = _finite(statistic(*samples)), np.empty(resamples)
    for index in range(resamples):
        rows = torch.randint(lengths[0], (lengths[0],), generator=generator)
        drawn = [samples[0][rows]]
        for sample in samples[1:]:
            rows = rows if draw == "paired" else torch.randint(len(sample), (len(sample),), generator=generator)
            drawn.append(sample[rows])
        values[index] = _finite(statistic(*drawn))
    low: float | None = None
    high: float | None = None
    tail = (1 - level) / 2
    if kind != "normal":
        shift = estimate - float(values.mean()) if kind == "centred" else 0.0
        low, high = (float(end) + shift for end in np.quantile(values, [tail, 1 - tail]))
    elif resamples > 1:
        reach = statistics.NormalDist().inv_cdf(1 - tail) * float(values.std(ddof=1))
        low, high = estimate - reach, estimate + reach
    return {"estimate": estimate, "low": low, "high": high, "level": level, "resamples": resamples}


def _finite(value: float | Tensor) -> float:
    why = "Resample one that is always finite, such as the mean square error instead of PSNR."
    check("bootstrap", float(value), math.isfinite(value), "a finite statistic", why)
    return float(value)


def small_sample_note(
    metric: Literal["frechet_distance", "inception_score", "precision_recall", "mean"], count: int, size: int = 1
) -> str | None:
    """One sentence on what too few images do to a metric, or None if there are enough.

    Frechet (size: D, the length of a vector): two sets of n from one Gaussian with covariance σ² I are apart by about
    σ² D (D + 5) / (2 n) for large n (arXiv:1911.07023). Inception score (size: number of classes K): too low by up to
    (K - 1) / (2 n) of its logarithm (Miller 1955).
    """
    if metric == "frechet_distance" and count <= size:
        said = (f"for {size} dimensions: the covariance is singular, and the distance is mostly bias. It is comparable "
                "only with others at the same n")  # fmt: skip
    elif metric == "frechet_distance" and count < FRECHET_IMAGES:
        said = ": the distance is biased upwards by an amount that falls as 1/n. Compare at the same n only"
    elif metric == "inception_score" and count < 4 * (size - 1):
        said = f"for {size} classes: the score may be too low by up to {100 * (size - 1) / (2 * count):.0f} %"
    elif metric == "precision_recall" and count < MANIFOLD_IMAGES:
        said = f": precision and recall depend on n; published ones use {MANIFOLD_IMAGES} or more"
    elif metric == "mean" and count < MEAN_IMAGES:
        said = f": a bootstrap interval of fewer than {MEAN_IMAGES} is too narrow"
    else:
        return None
    return f"{count} images{'' if said.startswith(':') else ' '}{said}."
