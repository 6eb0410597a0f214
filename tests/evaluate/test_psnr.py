"""PSNR: decibels by hand, the data range, and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from modiff.errors import ConfigError
from modiff.evaluate.psnr import psnr


def test_a_mean_square_of_a_hundredth_is_20_dB() -> None:
    assert psnr(np.full((2, 8, 8, 3), 0.6), np.full((2, 8, 8, 3), 0.5)) == pytest.approx(20, abs=1e-9)


def test_it_averages_over_all_elements_before_the_logarithm() -> None:
    reference = torch.zeros(4, dtype=torch.float64)
    value = torch.tensor([0.2, 0.0, 0.0, 0.0], dtype=torch.float64)
    assert psnr(value, reference) == pytest.approx(20, abs=1e-9)  # 0.04 / 4 = 0.01


def test_the_data_range_moves_it_by_its_square() -> None:
    x, y = torch.tensor([0.25]), torch.tensor([0.5])
    assert psnr(x, y, data_range=10) == pytest.approx(psnr(x, y) + 20, abs=1e-9)
    assert psnr(255 * x, 255 * y, data_range=255) == pytest.approx(psnr(x, y), abs=1e-9)


def test_bytes_do_not_wrap_around() -> None:
    value, reference = np.array([0], dtype=np.uint8), np.array([255], dtype=np.uint8)
    assert psnr(value, reference, data_range=255) == 0


def test_equal_images_are_infinitely_alike_and_nan_shows() -> None:
    x = torch.rand(3, 4)
    assert psnr(x, x.clone()) == math.inf
    assert math.isnan(psnr(x, x * math.nan))


@pytest.mark.parametrize("data_range", [0, -1, math.inf, math.nan])
def test_a_range_that_is_none_is_an_error(data_range: float) -> None:
    with pytest.raises(ConfigError, match="positive data_range"):
        psnr(torch.ones(1), torch.ones(1), data_range=data_range)


def test_shapes_that_would_broadcast_are_an_error() -> None:
    with pytest.raises(ConfigError, match="two equal shapes"):
        psnr(torch.ones(2, 3), torch.ones(1, 3))
