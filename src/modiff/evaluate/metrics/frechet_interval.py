"""A Frechet distance with its confidence interval and an estimate of its bias."""

from __future__ import annotations

from torch import Tensor

from modiff.evaluate.metrics.bootstrap import Draw, Interval, Kind, interval, resampled
from modiff.evaluate.metrics.frechet_distance import frechet_distance
from modiff.evaluate.metrics.moments import Moments
from modiff.evaluate.metrics.rows import as_rows


class FrechetInterval(Interval):
    """`bias`: how much larger the distance is at this n than with no end of images, as the resamples tell it."""

    bias: float


def frechet_interval(
    features: Tensor,
    reference: Tensor | Moments,
    *,
    resamples: int = 200,
    level: float = 0.95,
    seed: int = 0,
    draw: Draw = "independent",
    kind: Kind = "centred",
) -> FrechetInterval:
    """`frechet_distance` of two sets of features with a bootstrap interval.

    The interval says where the distance of another n images of the same models would fall, at this n: it does not
    remove the bias. A resample holds about 63 % of the images, some of them twice, so it is biased once more; by how
    much is returned as `bias`, a rough estimate of the first bias that grows too small when n is not far above D.

    Args:
        features: (N, D).
        reference: features (M, D), or the moments of a fixed reference, which is not resampled.
        draw: "paired" if row i of both comes from one seed; see `bootstrap`.
        kind: "centred", or "normal" where few resamples can be paid for; see `bootstrap`.
    Raises: ConfigError as `bootstrap` and `frechet_distance`.
    Cost: resamples + 1 distances, each O((N + M) D² + D³).
    """
    rows = as_rows(features, "frechet_interval")
    samples = [rows] if isinstance(reference, Moments) else [rows, as_rows(reference, "frechet_interval")]

    def distance(first: Tensor, second: Tensor | Moments = reference) -> float:
        return frechet_distance(Moments.of(first), second if isinstance(second, Moments) else Moments.of(second))

    estimate = distance(*samples)
    values = resampled(distance, samples, resamples=resamples, seed=seed, draw=draw)
    found = interval(estimate, values, level=level, kind=kind)
    return {**found, "bias": float(values.mean()) - estimate}
