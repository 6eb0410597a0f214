"""Metrics: plain loops and closed forms in float64, intervals over images, and what cannot be compared."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modiff.errors import ConfigError
from modiff.evaluate.metrics import sets as module
from modiff.evaluate.metrics.bootstrap import bootstrap
from modiff.evaluate.metrics.frechet import Moments, feature_rows, frechet_distance, frechet_interval
from modiff.evaluate.metrics.paired import paired_errors, psnr, relative_l2, ssim
from modiff.evaluate.metrics.sets import inception_score, kernel_distance, polynomial_mmd, within_manifold
from tests.evaluate.fakes import noise
from tests.reference import metrics as reference


def gaussian(seed: int, count: int, mean: Tensor, covariance: Tensor) -> Tensor:
    """Vectors (count, D) in float64 from one Gaussian."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, len(mean), generator=generator, dtype=torch.float64)
    return mean + noise @ torch.linalg.cholesky(covariance).T


def rotation(seed: int, dimension: int) -> Tensor:
    """A random orthogonal matrix."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(dimension, dimension, generator=generator, dtype=torch.float64)).Q


@st.composite
def feature_sets(draw: st.DrawFn, dimension: int | None = None, smallest: int = 2, largest: int = 12) -> Tensor:
    """(N, D) float64, of any offset and spread, sometimes with equal rows."""
    width = dimension or draw(st.integers(1, 5))
    count = draw(st.integers(smallest, largest))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows = torch.randn(count, width, generator=generator, dtype=torch.float64)
    rows = rows * draw(st.sampled_from([1e-3, 1.0, 50.0])) + draw(st.sampled_from([0.0, 1.0, -300.0]))
    return rows[torch.randint(count, (count,), generator=generator)] if draw(st.booleans()) else rows


ZERO, ONE = torch.zeros(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
ROTATION = rotation(1, 4)


def moments(mean: Tensor, covariance: Tensor) -> Moments:
    """Those of a distribution."""
    known = Moments(len(mean))
    known.count, known.mean, known.scatter = 2, mean, covariance
    return known


def diagonal(*values: float) -> Tensor:
    return torch.diag(torch.tensor(values, dtype=torch.float64))


def distance(first: Tensor, second: Tensor) -> float:
    return frechet_distance(Moments.of(first), Moments.of(second))


@given(feature_sets(), st.lists(st.integers(0, 12), max_size=4))
def test_any_batches_give_the_mean_and_covariance_of_exact_sums(rows: Tensor, cuts: list[int]) -> None:
    mean, covariance = reference.mean_and_covariance(rows.tolist())
    moments = Moments(rows.shape[1])
    for batch in torch.tensor_split(rows, sorted(cuts)):
        moments.update(batch)
    spread = max(np.trace(covariance), 1e-20)
    assert moments.count == len(rows)
    np.testing.assert_allclose(moments.mean, mean, rtol=1e-13, atol=1e-13 * float(rows.abs().max()))
    np.testing.assert_allclose(moments.covariance() / spread, np.array(covariance) / spread, atol=1e-9)


@pytest.mark.parametrize("turn", [torch.eye(4, dtype=torch.float64), ROTATION])
def test_gaussians_with_common_axes_are_apart_by_their_means_and_standard_deviations(turn: Tensor) -> None:
    mean = torch.tensor([1.0, -2.0, 0.0, 0.5], dtype=torch.float64)
    first = moments(ZERO, turn @ diagonal(1, 4, 9, 16) @ turn.T)
    second = moments(turn @ mean, turn @ diagonal(9, 4, 1, 0.25) @ turn.T)
    # |mean|² + (1 - 3)² + (2 - 2)² + (3 - 1)² + (4 - 0.5)²
    assert frechet_distance(first, second) == pytest.approx(5.25 + 4 + 0 + 4 + 12.25, rel=1e-12)


def test_it_agrees_with_an_iteration_on_the_product_itself() -> None:
    first = gaussian(0, 12, ZERO[:3], ONE[:3, :3])
    second = gaussian(1, 15, ZERO[:3] + 0.5, diagonal(0.3, 2, 1))
    expected = reference.frechet_distance(first.tolist(), second.tolist())
    assert distance(first, second) == pytest.approx(expected, rel=1e-9)


def test_fewer_images_than_dimensions_give_the_distance_within_the_space_they_span() -> None:
    # three vectors in the plane, then turned into 40 dimensions: distances do not change, covariances become singular
    plane, other = torch.randn(3, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64) * 2 + 1
    frame = rotation(5, 40)[:, :2]
    assert distance(plane @ frame.T, other @ frame.T) == pytest.approx(distance(plane, other), rel=1e-6)


def test_the_estimate_is_the_distance_and_lies_inside_while_plain_percentiles_lie_above() -> None:
    zero, one = torch.zeros(20, dtype=torch.float64), torch.eye(20, dtype=torch.float64)
    first, second = gaussian(0, 100, zero, one), gaussian(1, 100, zero, one)  # most of it is bias: 20 * 25 / 200
    interval = frechet_interval(first, second, resamples=60, seed=2)
    plain = bootstrap(distance, [first, second], resamples=60, seed=2)
    assert interval["estimate"] == pytest.approx(distance(first, second), rel=1e-12)
    assert interval["low"] < interval["estimate"] < interval["high"]
    assert plain["low"] > interval["estimate"]
    assert interval["high"] - interval["low"] == pytest.approx(plain["high"] - plain["low"])


def test_the_same_seeds_lower_the_distance_and_an_unchanged_model_is_at_0_only_with_them() -> None:
    rows, other = gaussian(0, 50, ZERO, ONE), gaussian(1, 50, ZERO, ONE)
    same = frechet_interval(rows, rows.clone(), resamples=10, draw="paired")
    assert max(abs(same[key]) for key in ("estimate", "low", "high")) < 1e-10
    apart = frechet_interval(rows, rows.clone(), resamples=10)
    assert apart["high"] - apart["low"] > 1e-3
    assert frechet_interval(rows, other, resamples=10)["estimate"] == pytest.approx(4 * 9 / 100, rel=0.5)


def test_mistakes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"here: expected real feature vectors \(N, D\), got \(\(3,\)"):
        feature_rows(torch.ones(3), "here")
    with pytest.raises(ConfigError, match="NaN or infinity in 2 of 3 rows"):
        feature_rows(torch.tensor([[math.nan], [1], [math.inf]]), "here")
    with pytest.raises(ConfigError, match=r"one dimension, got \(3, 4\)"):
        Moments(3).update(torch.ones(2, 4))
    with pytest.raises(ConfigError, match="2 or more vectors, got 1"):
        distance(torch.ones(4, 2), torch.ones(1, 2))


ZERO_3, ONE_3 = torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)


@given(feature_sets(dimension=3), feature_sets(dimension=3))
def test_the_discrepancy_agrees_with_plain_loops_and_is_symmetric(first: Tensor, second: Tensor) -> None:
    expected = reference.polynomial_mmd(first.tolist(), second.tolist())
    largest = max(float(rows.square().sum(1).max()) for rows in (first, second))
    size = (largest / 3 + 1) ** 3  # of the kernel's values, which cancel
    assert polynomial_mmd(first, second) == pytest.approx(expected, rel=1e-9, abs=1e-11 * size)
    assert polynomial_mmd(second, first) == pytest.approx(expected, rel=1e-9, abs=1e-11 * size)


def test_subsets_are_seeded_without_replacement_and_centre_on_the_estimate_of_everything() -> None:
    first, second = gaussian(0, 60, ZERO_3, ONE_3), gaussian(1, 80, ZERO_3 + 0.5, ONE_3)
    mean, std = kernel_distance(first, second, subsets=300, subset_size=20, seed=4)
    assert (mean, std) == kernel_distance(first, second, subsets=300, subset_size=20, seed=4)
    assert mean != kernel_distance(first, second, subsets=300, subset_size=20, seed=5)[0]
    assert mean == pytest.approx(polynomial_mmd(first, second), abs=4 * std / np.sqrt(300))
    # 59 of 60 different vectors: with replacement about 37 % would be missing and the std would be far larger
    assert 0 < kernel_distance(first, second[:60], subsets=50, subset_size=59)[1] < std / 5


@given(feature_sets(dimension=2, smallest=1), feature_sets(dimension=2, smallest=5), st.integers(1, 4))
def test_membership_agrees_with_plain_loops(queries: Tensor, manifold: Tensor, neighbours: int) -> None:
    # Whole numbers, whose squared distances are exact: a border is met or missed by both.
    queries, manifold = queries.round().clamp(-50, 50), manifold.round().clamp(-50, 50)
    expected = reference.within_manifold(queries.tolist(), manifold.tolist(), neighbours)
    assert within_manifold(queries, manifold, neighbours=neighbours).tolist() == expected


def test_distances_are_exact_and_any_chunk_of_memory_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    points = torch.randn(40, 6, dtype=torch.float64) + 1e4  # products would cancel here
    assert not within_manifold(points + 1e-6, points.repeat(5, 1)).any()  # four copies: every radius is 0
    assert within_manifold(points, points.repeat(5, 1)).all()
    real, made = torch.randn(23, 6), torch.randn(31, 6) * 1.2
    whole = within_manifold(made, real)
    for size in (1, 8 * 23, 5 * 8 * 23):
        monkeypatch.setattr(module, "CHUNK_BYTES", size)
        assert torch.equal(within_manifold(made, real), whole)
    assert 0 < int(whole.sum()) < 31


@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(2, 6))
def test_the_score_agrees_with_plain_loops_in_any_order(seed: int, count: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = (3 * torch.randn(count, classes, generator=generator, dtype=torch.float64)).softmax(1)
    (expected,) = reference.inception_score(rows.tolist(), 1)
    assert inception_score(rows) == pytest.approx(expected, rel=1e-12)
    assert inception_score(rows[torch.randperm(count)]) == pytest.approx(expected, rel=1e-12)


def test_sets_that_mean_nothing_are_refused() -> None:
    ones = torch.ones(10, 3)
    for other, subsets, size in ((torch.ones(12, 3), 100, 11), (ones, 0, 5), (ones, 100, 10)):
        with pytest.raises(ConfigError, match=rf"2 to 10 vectors.* got \({subsets}, {size}\)"):
            kernel_distance(ones, other, subsets=subsets, subset_size=size)
    with pytest.raises(ConfigError, match=r"2 or more vectors in each set, got \(1, 10\)"):
        polynomial_mmd(ones[:1], ones)
    for metric in (polynomial_mmd, within_manifold):
        with pytest.raises(ConfigError, match=r"one dimension, got \(3, 4\)"):
            metric(ones, torch.ones(10, 4))
    for rows in (torch.randn(4, 3), torch.full((4, 3), 0.3), torch.zeros(0, 3)):
        with pytest.raises(ConfigError, match="expected probabilities"):
            inception_score(rows)


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


ORIGINAL = noise(0, 40, 12, 12, 3).numpy()
CHANGED = np.clip(ORIGINAL + np.random.default_rng(9).integers(-30, 31, ORIGINAL.shape), 0, 255).astype(np.uint8)


def test_relative_l2_is_the_norm_of_the_difference_over_the_norm_of_the_reference() -> None:
    assert relative_l2(np.array([[0.0, 4.0], [0.0, 0.0]]), np.array([[3.0, 4.0], [0.0, 0.0]])) == 3 / 5
    assert relative_l2(torch.tensor([3, 3], dtype=torch.uint8), np.array([3, 4], dtype=np.float16)) == 1 / 5
    ordered = torch.tensor([1.0, 2.0, 3.0])
    assert relative_l2(ordered[[1, 2, 0]], ordered) == pytest.approx(math.sqrt(6 / 14))
    assert math.isnan(relative_l2(torch.tensor([1.0, math.nan, 3.0]), ordered))
    ones = torch.full((1000, 1000), 1.0)
    value = ones.clone()
    value[0, 0] += 2**-20  # exact in float64, lost in a float32 sum of a million squares
    assert relative_l2(value, ones) == pytest.approx(2**-20 / 1000, rel=1e-12)


def test_psnr_averages_over_all_elements_before_the_logarithm() -> None:
    zeros = torch.zeros(4, dtype=torch.float64)
    value = torch.tensor([0.2, 0.0, 0.0, 0.0], dtype=torch.float64)
    assert psnr(value, zeros) == pytest.approx(20, abs=1e-9)  # 0.04 / 4 = 0.01
    assert psnr(value, value) == math.inf
    assert math.isnan(psnr(value, value * math.nan))
    assert psnr(value, zeros, data_range=10) == pytest.approx(40, abs=1e-9)
    assert psnr(np.array([0], dtype=np.uint8), np.array([255], dtype=np.uint8), data_range=255) == 0  # no wrap-around


@given(st.integers(0, 10**6), st.integers(11, 13), st.integers(11, 13), st.sampled_from([5, 60, 255]))
def test_ssim_agrees_with_a_window_at_a_time(seed: int, height: int, width: int, change: int) -> None:
    x = noise(seed, height, width).double()
    y = (x + noise(seed + 1, height, width).double() * change / 255 - change / 2).clamp(0, 255).round()
    errors = ssim(x[None, :, :, None], y[None, :, :, None]).item()
    assert errors == pytest.approx(reference.ssim(x.numpy(), y.numpy()), rel=1e-9, abs=1e-12)


def test_estimates_are_the_metrics_of_all_pixels_and_ends_come_from_resampled_pairs() -> None:
    errors = paired_errors(CHANGED, torch.from_numpy(ORIGINAL), resamples=41)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(40, (40,), generator=generator).numpy() for _ in range(41)]
    for name, metric in (
        ("psnr_db", lambda x, y: psnr(x, y, data_range=255)),
        ("relative_l2", relative_l2),
        ("ssim", lambda x, y: float(ssim(x, y).mean())),
    ):
        assert errors[name]["estimate"] == pytest.approx(metric(CHANGED, ORIGINAL), rel=1e-12)
        low, high = np.quantile([metric(CHANGED[row], ORIGINAL[row]) for row in rows], [0.025, 0.975])
        # the second and the last but one: between two values, quantiles of an error and of its logarithm differ
        assert (errors[name]["low"], errors[name]["high"]) == pytest.approx((low, high), rel=1e-6)
    assert (errors["n"], errors["note"]) == (40, None)
    assert json.loads(json.dumps(errors, allow_nan=False)) == errors


def test_equal_images_have_no_finite_psnr_and_one_pixel_leaves_an_open_end() -> None:
    equal = paired_errors(ORIGINAL, ORIGINAL, resamples=5)
    assert [equal["psnr_db"][end] for end in ("estimate", "low", "high")] == [None, None, None]
    assert [equal["relative_l2"][end] for end in ("estimate", "low", "high")] == [0, 0, 0]
    assert equal["ssim"]["low"] == 1
    images = ORIGINAL.copy()
    images[0, 0, 0, 0] ^= 128
    errors = paired_errors(images, ORIGINAL, resamples=200)
    assert errors["psnr_db"]["estimate"] == pytest.approx(10 * math.log10(255**2 * ORIGINAL.size / 128**2))
    assert errors["psnr_db"]["high"] is None  # over a third of the resamples leave the pair out
    assert errors["psnr_db"]["low"] < errors["psnr_db"]["estimate"]


def test_what_cannot_be_compared_is_an_error() -> None:
    for x, y, message in (
        (torch.ones(2, 3), torch.ones(3), r"relative_l2: .* got \[\(\(2, 3\), .*\(\(3,\)"),
        (torch.ones(0), torch.ones(0), "at least one, got"),
        (torch.ones(3), torch.zeros(3), "not zero"),
        (torch.ones(3, dtype=torch.complex64), torch.ones(3), "real values"),
    ):
        with pytest.raises(ConfigError, match=message):
            relative_l2(x, y)
    with pytest.raises(ConfigError, match="at least 11 pixels a side"):
        ssim(torch.zeros(1, 10, 12, 1), torch.zeros(1, 10, 12, 1))
    with pytest.raises(ConfigError, match="not black throughout"):
        paired_errors(ORIGINAL, 0 * ORIGINAL)
