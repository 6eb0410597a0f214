"""Image against image: formulas by hand, a window at a time, torchmetrics, and intervals over pairs."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modiff.errors import ConfigError
from modiff.evaluate.metrics.paired import paired_errors, psnr, relative_l2, ssim
from tests.evaluate.features.images import noise
from tests.reference import metrics as reference

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
    errors = paired_errors(CHANGED, torch.from_numpy(ORIGINAL), resamples=50, seed=3, level=0.8)
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(40, (40,), generator=generator).numpy() for _ in range(50)]
    for name, metric in (
        ("psnr_db", lambda x, y: psnr(x, y, data_range=255)),
        ("relative_l2", relative_l2),
        ("ssim", lambda x, y: float(ssim(x, y).mean())),
    ):
        assert errors[name]["estimate"] == pytest.approx(metric(CHANGED, ORIGINAL), rel=1e-12)
        low, high = np.quantile([metric(CHANGED[row], ORIGINAL[row]) for row in rows], [0.1, 0.9])
        # the quantile is taken of the mean square error and of its logarithm there: they differ between two values
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
