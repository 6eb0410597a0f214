"""Paired errors: the metrics of the whole arrays, intervals over pairs, and the edges."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from modiff.errors import ConfigError
from modiff.evaluate.metrics.paired import paired_errors
from modiff.evaluate.metrics.ssim import ssim
from modiff.evaluate.psnr import psnr
from modiff.evaluate.relative_l2 import relative_l2


def bytes_(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def changed(images: np.ndarray, by: int, seed: int = 9) -> np.ndarray:
    step = np.random.default_rng(seed).integers(-by, by + 1, images.shape)
    return np.clip(images + step, 0, 255).astype(np.uint8)


REFERENCE = bytes_(0, 40, 12, 12, 3)
FOUND = changed(REFERENCE, 30)


def test_the_estimates_are_the_metrics_of_the_whole_arrays() -> None:
    found = paired_errors(FOUND, torch.from_numpy(REFERENCE), resamples=20)
    assert found["n"] == 40
    assert found["psnr_db"]["estimate"] == pytest.approx(psnr(FOUND, REFERENCE, data_range=255), rel=1e-12)
    assert found["relative_l2"]["estimate"] == pytest.approx(relative_l2(FOUND, REFERENCE), rel=1e-12)
    assert found["ssim"] is not None
    assert found["ssim"]["estimate"] == pytest.approx(float(ssim(FOUND, REFERENCE).mean()), rel=1e-12)
    assert found["note"] is None
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_the_ends_come_from_resampled_pairs_of_images() -> None:
    found = paired_errors(FOUND, REFERENCE, resamples=50, seed=3, level=0.8)
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(40, (40,), generator=generator).numpy() for _ in range(50)]
    for name, by_hand in (
        ("psnr_db", [psnr(FOUND[row], REFERENCE[row], data_range=255) for row in rows]),
        ("relative_l2", [relative_l2(FOUND[row], REFERENCE[row]) for row in rows]),
        ("ssim", [float(ssim(FOUND[row], REFERENCE[row]).mean()) for row in rows]),
    ):
        low, high = np.quantile(by_hand, [0.1, 0.9])
        # the quantile is taken of the mean square error and of its logarithm there: they differ between two values
        assert found[name]["low"] == pytest.approx(low, rel=1e-6)
        assert found[name]["high"] == pytest.approx(high, rel=1e-6)
        assert found[name]["low"] < found[name]["estimate"] < found[name]["high"]


def test_equal_images_have_no_finite_psnr_and_no_error() -> None:
    found = paired_errors(REFERENCE, REFERENCE, resamples=5)
    assert [found["psnr_db"][end] for end in ("estimate", "low", "high")] == [None, None, None]
    assert [found["relative_l2"][end] for end in ("estimate", "low", "high")] == [0, 0, 0]
    assert found["ssim"]["low"] == 1


def test_one_pair_that_differs_gives_a_finite_psnr_with_an_open_end() -> None:
    found = REFERENCE.copy()
    found[0, 0, 0, 0] ^= 128
    errors = paired_errors(found, REFERENCE, resamples=200)
    assert errors["psnr_db"]["estimate"] == pytest.approx(10 * math.log10(255**2 * REFERENCE.size / 128**2))
    assert errors["psnr_db"]["high"] is None  # over a third of the resamples leave the pair out
    assert errors["psnr_db"]["low"] < errors["psnr_db"]["estimate"]


def test_images_below_the_window_have_no_ssim_and_few_images_a_note() -> None:
    found = paired_errors(bytes_(1, 29, 8, 8, 1), bytes_(2, 29, 8, 8, 1), resamples=5)
    assert found["ssim"] is None
    assert found["note"] is not None
    assert found["note"].startswith("29 images")


def test_a_black_image_among_others_is_fine_and_black_ones_only_are_an_error() -> None:
    reference = np.zeros((3, 4, 4, 1), dtype=np.uint8)
    with pytest.raises(ConfigError, match="not black throughout"):
        paired_errors(reference + 1, reference)
    reference[0] = 100
    assert math.isfinite(paired_errors(reference + 1, reference, resamples=50)["relative_l2"]["high"])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (REFERENCE / 255, "uint8 images"),
        (REFERENCE[0], "uint8 images"),
        (REFERENCE[:5], "two equal shapes"),
    ],
)
def test_mistakes_are_refused(value: np.ndarray, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        paired_errors(value, REFERENCE)
