"""SSIM: closed forms, a window at a time, torchmetrics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from modiff.errors import ConfigError
from modiff.evaluate.metrics.ssim import ssim
from tests.reference import metrics as reference

C1 = (0.01 * 255) ** 2


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_equal_images_score_exactly_1() -> None:
    images = noise(0, 3, 14, 12, 3)
    assert ssim(images, images.clone()).tolist() == [1, 1, 1]


def test_constant_images_are_told_apart_by_their_brightness_alone() -> None:
    x, y = torch.full((1, 12, 12, 1), 100), torch.full((1, 12, 12, 1), 180)
    assert ssim(x, y).item() == pytest.approx((2 * 100 * 180 + C1) / (100**2 + 180**2 + C1), rel=1e-12)


def test_a_constant_shift_of_a_texture_leaves_its_structure() -> None:
    # One window: its mean μ is the weighted share of the stripes, and only (2 μ (μ + 30) + C1) / (...) is left.
    x = torch.zeros(1, 11, 11, 1)
    x[:, ::2] = 40
    offset = torch.arange(11.0, dtype=torch.float64) - 5
    weights = (-(offset**2) / 4.5).exp()
    mean = float(40 * weights[::2].sum() / weights.sum())
    expected = (2 * mean * (mean + 30) + C1) / (mean**2 + (mean + 30) ** 2 + C1)
    assert ssim(x, x + 30).item() == pytest.approx(expected, rel=1e-12)


@given(st.integers(0, 10**6), st.integers(11, 13), st.integers(11, 13), st.sampled_from([5, 60, 255]))
def test_it_agrees_with_a_window_at_a_time(seed: int, height: int, width: int, change: int) -> None:
    x = noise(seed, height, width).double()
    y = (x + noise(seed + 1, height, width).double() * change / 255 - change / 2).clamp(0, 255).round()
    found = ssim(x[None, :, :, None], y[None, :, :, None]).item()
    assert found == pytest.approx(reference.ssim(x.numpy(), y.numpy()), rel=1e-9, abs=1e-12)


def test_it_agrees_with_torchmetrics_on_colour_and_is_symmetric() -> None:
    x, y = noise(1, 5, 20, 17, 3), noise(2, 5, 20, 17, 3)
    y = (0.7 * x.double() + 0.3 * y.double()).round().to(torch.uint8)
    planes = [images.permute(0, 3, 1, 2).double() for images in (x, y)]
    _, theirs = structural_similarity_index_measure(*planes, data_range=255.0, return_full_image=True)
    inside = theirs[:, :, 5:-5, 5:-5].mean(dim=(1, 2, 3))  # its mean also counts windows over a mirrored border
    torch.testing.assert_close(ssim(x, y), inside, rtol=1e-9, atol=1e-12)
    assert torch.equal(ssim(x, y), ssim(y, x))


def test_each_image_is_scored_by_itself_in_any_batch() -> None:
    x, y = noise(3, 70, 12, 11, 1), noise(4, 70, 12, 11, 1)
    single = torch.cat([ssim(x[i : i + 1], y[i : i + 1]) for i in range(70)])
    torch.testing.assert_close(ssim(x, y), single, rtol=0, atol=1e-12)


def test_the_range_of_the_values_is_a_unit() -> None:
    x, y = noise(5, 1, 12, 12, 1).numpy(), noise(6, 1, 12, 12, 1).numpy()
    expected = pytest.approx(ssim(x, y).item(), rel=1e-9)
    assert ssim(x / np.float64(255), y / np.float64(255), data_range=1).item() == expected


@pytest.mark.parametrize(
    ("shape", "other", "data_range", "message"),
    [
        ((1, 10, 12, 1), (1, 10, 12, 1), 255, "at least 11 pixels a side"),
        ((12, 12), (12, 12), 255, r"images \(N, H, W, C\)"),
        ((1, 12, 12, 1), (1, 12, 12, 3), 255, "two equal shapes"),
        ((1, 12, 12, 1), (1, 12, 12, 1), 0, "positive data_range, got 0"),
    ],
)
def test_mistakes_are_refused(shape: tuple[int, ...], other: tuple[int, ...], data_range: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ssim(torch.zeros(shape), torch.zeros(other), data_range=data_range)
