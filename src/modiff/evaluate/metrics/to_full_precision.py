"""Distance of a quantized model's images to those of the full-precision model, as sets."""

from __future__ import annotations

from typing import Literal, TypedDict

from torch import Tensor

from modiff.errors import ConfigError
from modiff.evaluate.metrics.bootstrap import Kind
from modiff.evaluate.metrics.frechet_interval import FrechetInterval, frechet_interval
from modiff.evaluate.metrics.small_sample import small_sample_note

Seeds = Literal["same", "independent"]


class ToFullPrecision(TypedDict):
    """A distance means nothing without `seeds` and both set sizes, so they are here."""

    seeds: Seeds
    n: int
    n_full_precision: int
    distance: FrechetInterval
    note: str


def to_full_precision(
    features: Tensor,
    full_precision: Tensor,
    *,
    seeds: Seeds,
    resamples: int = 200,
    level: float = 0.95,
    seed: int = 0,
    kind: Kind = "centred",
) -> ToFullPrecision:
    """The Frechet distance between images of the quantized and of the full-precision model (FID2FP32, AccuQuant).

    Distances to real data can shrink by accident when a model gets worse; this one cannot fall below that of the same
    model. With the same seeds the two sets are dependent: the biases cancel, an unchanged model is at 0, and values
    are lower than with independent seeds, where even an unchanged model is at the bias of n images. The two are never
    comparable. Report the paired metrics (`paired_errors`) beside it.

    Args:
        features, full_precision: (N, D) and (M, D) of one extractor; with seeds="same", row i of both from seed i.
        seeds: how the two sets were generated; the intervals resample pairs or sets accordingly.
        resamples, level, seed, kind: of the interval; see `frechet_interval`.
    Raises: ConfigError for unknown seeds, or sets of different sizes with the same ones; else as `frechet_interval`.
    """
    if seeds not in ("same", "independent") or (seeds == "same" and len(features) != len(full_precision)):
        raise ConfigError(
            f"to_full_precision: expected seeds 'independent', or 'same' with two sets of one size, got {seeds!r} with "
            f"{len(features)} and {len(full_precision)} images. The value depends on it. State how both sets were made."
        )
    draw = "paired" if seeds == "same" else "independent"
    found = frechet_interval(
        features, full_precision, resamples=resamples, level=level, seed=seed, draw=draw, kind=kind
    )
    return {
        "seeds": seeds,
        "n": len(features),
        "n_full_precision": len(full_precision),
        "distance": found,
        "note": _note(seeds, min(len(features), len(full_precision)), features.shape[1]),
    }


def _note(seeds: Seeds, count: int, dimension: int) -> str:
    small = small_sample_note("frechet_distance", count, dimension)
    how = (
        "Same seeds: the sets are dependent, which lowers the value; an unchanged model is at 0."
        if seeds == "same"
        else "Independent seeds: an unchanged model is not at 0 but at the bias of this n."
    )
    return how if small is None else f"{how} {small}"
