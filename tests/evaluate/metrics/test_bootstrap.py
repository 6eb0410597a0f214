"""Bootstrap: known intervals, coverage, pairs, seeds; and notes on small sets that are true."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from modiff.errors import ConfigError
from modiff.evaluate.metrics.bootstrap import bootstrap, small_sample_note


def mean(values: Tensor) -> float:
    return float(values.mean())


def normal(seed: int, count: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def resampled(kind: Any = "percentile", **settings: Any) -> Any:
    """An interval of a statistic that is 10 of the sample itself and 1, 2 and 6 of its resamples."""
    values = iter([10.0, 1.0, 2.0, 6.0])
    return bootstrap(lambda _: next(values), [torch.zeros(3)], kind=kind, **{"resamples": 3, **settings})


def test_a_normal_interval_is_the_spread_of_the_values_around_the_estimate() -> None:
    interval = resampled("normal")
    spread = math.sqrt(((1 - 3) ** 2 + (2 - 3) ** 2 + (6 - 3) ** 2) / 2)
    assert interval["low"] == pytest.approx(10 - 1.959964 * spread, rel=1e-6)
    assert interval["high"] == pytest.approx(10 + 1.959964 * spread, rel=1e-6)
    alone = resampled("normal", resamples=1)
    assert (alone["low"], alone["estimate"], alone["high"]) == (None, 10.0, None)


def test_percentiles_are_those_of_the_values_and_centring_moves_them_onto_the_estimate() -> None:
    low, high = np.quantile([1.0, 2.0, 6.0], [0.05, 0.95])
    interval = resampled(level=0.9)
    assert interval == {"estimate": 10.0, "low": pytest.approx(low), "high": pytest.approx(high), "level": 0.9,
                        "resamples": 3}  # fmt: skip
    centred = resampled("centred", level=0.9)
    assert (centred["low"], centred["high"]) == (pytest.approx(low + 7), pytest.approx(high + 7))


def test_pairs_stay_together_and_independent_sets_do_not() -> None:
    first = normal(2, 60)

    def difference(a: Tensor, b: Tensor) -> float:
        return float((b - a).mean())

    paired = bootstrap(difference, [first, first + 1], resamples=50, draw="paired")
    assert (paired["low"], paired["high"]) == (pytest.approx(1, abs=1e-12), pytest.approx(1, abs=1e-12))
    independent = bootstrap(difference, [first, first + 1], resamples=50)
    error = math.sqrt(2 / 60) * float(first.std())
    assert independent["high"] - independent["low"] == pytest.approx(2 * 1.96 * error, rel=0.4)


def test_mistakes_are_refused() -> None:
    ones = torch.ones(3)
    for samples, draw, resamples in (
        ([ones[:0]], "independent", 5),
        ([ones], "paired", 0),
        ([ones, ones[:2]], "paired", 5),
    ):
        with pytest.raises(ConfigError, match="expected samples with images"):
            bootstrap(lambda rows, *_: 0.0, samples, resamples=resamples, draw=draw)
    with pytest.raises(ConfigError, match="expected a finite statistic, got inf"):
        bootstrap(lambda _: math.inf, [ones])


def test_each_metric_has_a_number_of_images_below_which_a_note_stands() -> None:
    for metric, enough, size, words in (
        ("frechet_distance", 2048, 128, "biased upwards"),
        ("frechet_distance", 5001, 5000, "singular"),
        ("inception_score", 36, 10, "too low by up to 13 %"),
        ("precision_recall", 10_000, 1, "depend on n"),
        ("mean", 30, 1, "too narrow"),
    ):
        assert small_sample_note(metric, enough, size) is None
        note = small_sample_note(metric, enough - 1, size)
        assert note.startswith(f"{enough - 1} images")
        assert words in note
