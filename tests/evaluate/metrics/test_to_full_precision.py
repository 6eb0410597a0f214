"""Distance to full precision: what the seeds do to it, and that it says so."""

from __future__ import annotations

import json

import pytest
import torch

from modiff.errors import ConfigError
from modiff.evaluate.metrics.frechet_distance import frechet_distance
from modiff.evaluate.metrics.moments import Moments
from modiff.evaluate.metrics.to_full_precision import to_full_precision
from tests.evaluate.metrics.features import gaussian

ZERO, ONE = torch.zeros(5, dtype=torch.float64), torch.eye(5, dtype=torch.float64)
FULL, OTHER = gaussian(0, 50, ZERO, ONE), gaussian(1, 50, ZERO, ONE)
QUANTIZED = FULL + 0.05 * gaussian(2, 50, ZERO, ONE)


def test_it_is_the_distance_and_says_how_the_sets_were_made() -> None:
    found = to_full_precision(QUANTIZED, FULL, seeds="same", resamples=10)
    expected = frechet_distance(Moments.of(QUANTIZED), Moments.of(FULL))
    assert found["distance"]["estimate"] == pytest.approx(expected, rel=1e-12)
    assert (found["seeds"], found["n"], found["n_full_precision"]) == ("same", 50, 50)
    assert "dependent, which lowers the value" in found["note"]
    assert "50 images" in found["note"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_the_same_seeds_lower_it_and_an_unchanged_model_is_at_0_only_with_them() -> None:
    same = to_full_precision(QUANTIZED, FULL, seeds="same", resamples=10)["distance"]["estimate"]
    independent = to_full_precision(QUANTIZED, OTHER, seeds="independent", resamples=10)["distance"]["estimate"]
    assert same < independent / 5
    unchanged = to_full_precision(FULL, FULL.clone(), seeds="same", resamples=10)["distance"]
    assert unchanged["high"] == pytest.approx(0, abs=1e-10)
    # bias of two independent sets of 50: D (D + 5) / (2 n) = 0.5
    floor = to_full_precision(FULL, OTHER, seeds="independent", resamples=10)
    assert floor["distance"]["estimate"] == pytest.approx(0.5, rel=0.5)
    assert "not at 0 but at the bias" in floor["note"]


def test_pairs_are_resampled_together_only_with_the_same_seeds() -> None:
    same = to_full_precision(QUANTIZED, FULL, seeds="same", resamples=40)["distance"]
    apart = to_full_precision(QUANTIZED, FULL, seeds="independent", resamples=40)["distance"]
    assert same["high"] - same["low"] < (apart["high"] - apart["low"]) / 5


def test_sizes_may_differ_with_independent_seeds_and_many_images_need_no_warning() -> None:
    found = to_full_precision(OTHER[:30], FULL, seeds="independent", resamples=5)
    assert (found["n"], found["n_full_precision"]) == (30, 50)
    assert found["note"].count("30 images") == 1
    many = gaussian(3, 2048, ZERO[:1], ONE[:1, :1])
    assert "images" not in to_full_precision(many, many, seeds="same", resamples=2)["note"]


def test_unstated_seeds_and_unpaired_sizes_are_errors() -> None:
    with pytest.raises(ConfigError, match="got 'same' with 30 and 50 images"):
        to_full_precision(OTHER[:30], FULL, seeds="same")
    with pytest.raises(ConfigError, match="got 'unknown'"):
        to_full_precision(OTHER, FULL, seeds="unknown")  # type: ignore[arg-type]
