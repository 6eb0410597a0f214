"""Image against image: relative L2, PSNR, SSIM, and all three with intervals over pairs from the same seeds."""

import functools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modiff.config import check
from modiff.evaluate.metrics.bootstrap import Interval, bootstrap, small_sample_note

WINDOW, SIGMA, K1, K2, PEAK = 11, 1.5, 0.01, 0.03, 255.0
_NOTHING = "An error cannot be a share of nothing. Look at the reference, or compare the norm of the difference."


def relative_l2(value: Tensor | np.ndarray, reference: Tensor | np.ndarray) -> float:
    """||value - reference|| / ||reference||, over all elements together, computed in float64; NaN if either holds NaN.

    Raises: ConfigError if the shapes differ, there is nothing to compare, or the reference is all zeros.

    >>> relative_l2(torch.tensor([3.0, 3.0]), torch.tensor([3.0, 4.0]))
    0.2
    """
    x, y = _float64_pair(value, reference, "relative_l2")
    size = y.norm()
    check("relative_l2", 0, bool(size != 0), "a reference that is not zero", _NOTHING)
    return float((x - y).norm() / size)


def psnr(value: Tensor | np.ndarray, reference: Tensor | np.ndarray, *, data_range: float = 1.0) -> float:
    """10 log10(data_range² / mean((value - reference)²)) in dB, over all elements together; inf for equal ones.

    data_range: largest minus smallest possible value: 1 for images in [0, 1], 255 for 8-bit ones.
    Raises: ConfigError if the shapes differ, or there is nothing to compare.
    """
    x, y = _float64_pair(value, reference, "psnr")
    mean_square = float((x - y).square().mean())
    return math.inf if mean_square == 0 else 10 * math.log10(data_range**2 / mean_square)


def ssim(value: Tensor | np.ndarray, reference: Tensor | np.ndarray) -> Tensor:
    """SSIM of each 8-bit image (Wang et al. 2004), float64 (N,); 1 for equal images, down to -1.

        (2 μ_x μ_y + C1)(2 σ_xy + C2) / ((μ_x² + μ_y² + C1)(σ_x² + σ_y² + C2))        C_i = (K_i 255)²

    averaged over channels and over the positions of an 11 x 11 Gaussian window of sigma 1.5 that lies wholly inside
    the image. Images (N, H, W, C) in [0, 255].
    Raises: ConfigError if the shapes differ or are under 11 pixels a side.
    """
    first, second = _float64_pair(value, reference, "ssim")
    fits = first.ndim == 4 and min(first.shape[1:3]) >= WINDOW
    expected = f"images (N, H, W, C) of at least {WINDOW} pixels a side"
    check("ssim", tuple(first.shape), fits, expected, "That is its window. Use psnr for smaller images.")
    pairs = zip(first.split(64), second.split(64), strict=True)
    return torch.cat([_ssim(x.permute(0, 3, 1, 2), y.permute(0, 3, 1, 2)) for x, y in pairs])


def _ssim(x: Tensor, y: Tensor) -> Tensor:
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    mean_x, mean_y = _blur(x), _blur(y)
    square_x, square_y, product = mean_x**2, mean_y**2, mean_x * mean_y
    spread_x, spread_y = _blur(x * x) - square_x, _blur(y * y) - square_y
    luminance = (2 * product + c1) / (square_x + square_y + c1)
    structure = (2 * (_blur(x * y) - product) + c2) / (spread_x + spread_y + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _blur(images: Tensor) -> Tensor:
    """The Gaussian window at every position where it fits, rows then columns: (N, C, H - 10, W - 10)."""
    offset = torch.arange(WINDOW, dtype=torch.float64) - (WINDOW - 1) / 2
    weights = (-(offset**2) / (2 * SIGMA**2)).exp()
    weights = weights / weights.sum()
    planes = images.flatten(0, 1)[:, None]
    planes = nn.functional.conv2d(planes, weights.view(1, 1, -1, 1))
    return nn.functional.conv2d(planes, weights.view(1, 1, 1, -1)).unflatten(0, images.shape[:2])[:, :, 0]


def paired_errors(
    images: Tensor | np.ndarray, reference: Tensor | np.ndarray, *, resamples: int = 1000
) -> dict[str, Any]:
    """n, psnr_db, ssim and relative_l2 of images to full precision, image i of both from seed i, with intervals.

    PSNR and relative L2 are those of all pixels together, so one equal pair among many does not make them infinite;
    SSIM is the mean over images, and None below its window of 11 pixels. Images are uint8 (N, H, W, C).
    Raises: ConfigError for other shapes, or a reference that is black throughout.
    """
    x, y = _float64_pair(images, reference, "paired_errors")
    errors, sizes = (x - y).square().sum(dim=(1, 2, 3)), y.square().sum(dim=(1, 2, 3))
    check("paired_errors", 0, bool(sizes.sum()), "a reference that is not black throughout", _NOTHING)

    def relative(error: Tensor, size: Tensor) -> float:
        return math.sqrt(float(error.sum()) / max(float(size.sum()), 1.0))  # a resample of black images only: size 0

    over_pairs = functools.partial(bootstrap, resamples=resamples, draw="paired")
    return {
        "n": len(x),
        "psnr_db": _decibels(over_pairs(torch.mean, [errors / x[0].numel()])),
        "ssim": over_pairs(torch.mean, [ssim(x, y)]) if min(x.shape[1:3]) >= WINDOW else None,
        "relative_l2": over_pairs(relative, [errors, sizes]),
        "note": small_sample_note("mean", len(x)),
    }


def _decibels(mean_square: Interval) -> Interval:
    """The interval of a mean square error in dB: low and high change places, and 0 becomes None."""
    estimate, high, low = (
        10 * math.log10(PEAK**2 / value) if value else None
        for value in (mean_square["estimate"], mean_square["low"], mean_square["high"])
    )
    return {**mean_square, "estimate": estimate, "low": low, "high": high}


def _float64_pair(value: Tensor | np.ndarray, reference: Tensor | np.ndarray, where: str) -> tuple[Tensor, Tensor]:
    x, y = (torch.as_tensor(each).detach() for each in (value, reference))
    fits = x.shape == y.shape and x.numel() > 0 and not x.is_complex() and not y.is_complex()
    got = [(tuple(each.shape), each.dtype) for each in (x, y)]
    why = "Broadcasting would compare what does not belong together. Reshape one of them."
    check(where, got, fits, "real values of one shape, at least one", why)
    return x.cpu().double(), y.cpu().double()
