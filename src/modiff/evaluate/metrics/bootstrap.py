"""Confidence intervals by resampling the images: how much would the figure move with other images of the same model?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Literal, TypedDict

import numpy as np
import torch
from torch import Tensor

from modiff.errors import ConfigError

Draw = Literal["independent", "paired"]
Kind = Literal["percentile", "centred", "normal"]


class Interval(TypedDict):
    """A figure and its interval, ready for JSON. An end, or the figure itself, is None where it is infinite."""

    estimate: float | None
    low: float | None
    high: float | None
    level: float
    resamples: int


def bootstrap(
    statistic: Callable[..., float],
    samples: Sequence[Tensor],
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    draw: Draw = "independent",
    kind: Kind = "percentile",
) -> Interval:
    """The statistic of the samples, and where it falls in `level` of their resamples (Efron 1979).

    Args:
        statistic: takes as many tensors as there are samples and gives a finite number.
        samples: tensors whose rows are images; float64 rows keep the statistic's own precision.
        resamples, level, seed, draw: see `resampled`; level is the share inside, as in 0.95.
        kind: "percentile" takes the quantiles of the resampled values. "centred" shifts them so that their mean lies on
            the estimate: for a statistic whose value depends on the number of distinct images, as the Frechet distance
            does, resampled values are all too large, and the plain interval may not even hold the estimate. "normal"
            takes their standard deviation alone, for a few tens of resamples, whose quantiles are noise.
    Raises: ConfigError for no resamples, a level outside (0, 1), an unknown kind, and as `resampled`.
    Cost: resamples + 1 evaluations of the statistic.

    >>> bootstrap(lambda x: float(x.mean()), [torch.zeros(5, 1)], resamples=10)
    {'estimate': 0.0, 'low': 0.0, 'high': 0.0, 'level': 0.95, 'resamples': 10}
    """
    values = resampled(statistic, samples, resamples=resamples, seed=seed, draw=draw)
    return interval(_finite(statistic(*samples)), values, level=level, kind=kind)


def resampled(
    statistic: Callable[..., float], samples: Sequence[Tensor], *, resamples: int, seed: int, draw: Draw
) -> np.ndarray:
    """The statistic of `resamples` draws of rows with replacement, float64 (resamples,).

    Args:
        draw: "independent" draws from each sample by itself, as many rows as it has; "paired" draws the same rows
            from all, for samples whose rows belong together (the same seeds).
        seed: of the only generator; the same seed gives the same values.
    Raises: ConfigError for empty samples, paired ones of different lengths, or a statistic that is not finite.
    """
    lengths = [len(sample) for sample in samples]
    if not lengths or min(lengths) < 1 or resamples < 1:
        raise ConfigError(
            f"bootstrap: expected samples with images and 1 or more resamples, got lengths {lengths} and {resamples}. "
            "There is nothing to draw. Give a tensor with a row for each image, and resamples=1000."
        )
    if draw not in ("independent", "paired") or (draw == "paired" and len(set(lengths)) > 1):
        raise ConfigError(
            f"bootstrap: expected draw 'independent', or 'paired' with equal lengths, got {draw!r} with {lengths}. "
            "Pairs are rows of one index. Use draw='independent' for sets that are not paired."
        )
    generator = torch.Generator().manual_seed(seed)
    values = np.empty(resamples)
    for index in range(resamples):
        rows = [torch.randint(length, (length,), generator=generator) for length in lengths[: _draws(draw, lengths)]]
        chosen = rows * len(samples) if draw == "paired" else rows
        values[index] = _finite(statistic(*(s[row] for s, row in zip(samples, chosen, strict=True))))
    return values


def interval(estimate: float, values: np.ndarray, *, level: float = 0.95, kind: Kind = "percentile") -> Interval:
    """The interval of `level` from resampled values; arguments and errors as for `bootstrap`."""
    if not 0 < level < 1 or kind not in ("percentile", "centred", "normal"):
        raise ConfigError(
            f"bootstrap: expected a level between 0 and 1 and the kind 'percentile', 'centred' or 'normal', got "
            f"{level!r} and {kind!r}. The level is a share. Use level=0.95."
        )
    tail = (1 - level) / 2
    if kind == "normal":
        low, high = _normal(estimate, values, tail)
        return {"estimate": estimate, "low": low, "high": high, "level": level, "resamples": len(values)}
    shift = estimate - float(values.mean()) if kind == "centred" else 0.0
    low, high = (float(end) + shift for end in np.quantile(values, [tail, 1 - tail]))
    return {"estimate": estimate, "low": low, "high": high, "level": level, "resamples": len(values)}


def _normal(estimate: float, values: np.ndarray, tail: float) -> tuple[float | None, float | None]:
    """The ends of a normal interval; None for a single value, which has no spread."""
    if len(values) < 2:
        return None, None
    reach = statistics.NormalDist().inv_cdf(1 - tail) * float(values.std(ddof=1))
    return estimate - reach, estimate + reach


def _draws(draw: Draw, lengths: list[int]) -> int:
    """How many lists of rows one resample needs."""
    return 1 if draw == "paired" else len(lengths)


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ConfigError(
            f"bootstrap: expected a finite statistic, got {value}. An interval of infinite values means nothing. "
            "Resample a finite one, such as the mean square error in the place of PSNR."
        )
    return float(value)
