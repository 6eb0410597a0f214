"""The interval of a Frechet distance: why it is centred, what it covers, and the bias it tells."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from modiff.evaluate.metrics.bootstrap import resampled
from modiff.evaluate.metrics.frechet_distance import frechet_distance
from modiff.evaluate.metrics.frechet_interval import frechet_interval
from modiff.evaluate.metrics.moments import Moments
from tests.evaluate.metrics.features import gaussian

D = 4
ZERO, ONE = torch.zeros(D, dtype=torch.float64), torch.eye(D, dtype=torch.float64)
TRUTH = Moments.given(ZERO, ONE, 10**9)


def distance(first: Tensor, second: Tensor) -> float:
    return frechet_distance(Moments.of(first), Moments.of(second))


def test_the_estimate_is_the_distance_and_lies_inside_while_plain_percentiles_lie_above() -> None:
    zero, one = torch.zeros(20, dtype=torch.float64), torch.eye(20, dtype=torch.float64)
    first, second = gaussian(0, 100, zero, one), gaussian(1, 100, zero, one)  # most of it is bias: 20 * 25 / 200
    found = frechet_interval(first, second, resamples=100, seed=2)
    plain = resampled(distance, [first, second], resamples=100, seed=2, draw="independent")
    assert found["estimate"] == pytest.approx(distance(first, second), rel=1e-12)
    assert found["low"] < found["estimate"] < found["high"]
    assert np.quantile(plain, 0.025) > found["estimate"]
    assert found["bias"] == pytest.approx(plain.mean() - found["estimate"], rel=1e-9)
    assert found["high"] - found["low"] == pytest.approx(np.quantile(plain, 0.975) - np.quantile(plain, 0.025))


def test_it_covers_the_distance_that_another_n_images_have_on_average() -> None:
    n, shift = 50, ZERO + 0.5
    expected = np.mean([frechet_distance(Moments.of(gaussian(i, n, shift, ONE)), TRUTH) for i in range(1000, 1300)])
    covered = 0
    for seed in range(40):
        found = frechet_interval(gaussian(seed, n, shift, ONE), TRUTH, resamples=40, level=0.9, seed=seed)
        covered += found["low"] <= expected <= found["high"]
    assert covered >= 29  # 0.9 of 40, less 3.5 standard deviations


def test_the_bias_it_tells_is_about_that_of_the_distance() -> None:
    n = 200
    told = np.mean([frechet_interval(gaussian(i, n, ZERO, ONE), TRUTH, resamples=40)["bias"] for i in range(10)])
    # one set of n against the truth: half of D (D + 5) / (2 n)
    assert told == pytest.approx(D * (D + 5) / (4 * n), rel=0.25)


def test_pairs_that_are_equal_have_no_distance_in_any_resample() -> None:
    rows = gaussian(0, 30, ZERO, ONE)
    found = frechet_interval(rows, rows.clone(), resamples=10, draw="paired")
    assert max(abs(found[key]) for key in ("estimate", "low", "high", "bias")) < 1e-10
    assert frechet_interval(rows, rows.clone(), resamples=10)["bias"] > 0.01


def test_a_fixed_reference_is_not_resampled_and_the_seed_decides_the_rest() -> None:
    rows = gaussian(0, 30, ZERO, ONE)
    first, again, other = (frechet_interval(rows, TRUTH, resamples=8, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first["low"] != other["low"]
    generator = torch.Generator().manual_seed(1)
    drawn = [rows[torch.randint(30, (30,), generator=generator)] for _ in range(8)]
    by_hand = np.mean([frechet_distance(Moments.of(part), TRUTH) for part in drawn])
    assert first["bias"] == pytest.approx(by_hand - first["estimate"], rel=1e-9)
