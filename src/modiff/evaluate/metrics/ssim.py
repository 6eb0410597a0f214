"""Structural similarity of two images."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from modiff.errors import ConfigError
from modiff.evaluate.relative_l2 import as_float64, check_same_shape

WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03


def ssim(value: Tensor | np.ndarray, reference: Tensor | np.ndarray, *, data_range: float = 255.0) -> Tensor:
    """SSIM of each image (Wang et al. 2004), float64 (N,); 1 for equal images, down to -1.

        (2 μ_x μ_y + C1)(2 σ_xy + C2) / ((μ_x² + μ_y² + C1)(σ_x² + σ_y² + C2))        C_i = (K_i data_range)²

    averaged over the image. Means and (co)variances are weighted by an 11 x 11 Gaussian of sigma 1.5 that sums to 1;
    K1 = 0.01, K2 = 0.03. Only windows that lie wholly inside the image count; nothing is padded, and large images are
    not halved first. Colour channels are averaged.

    Args:
        value, reference: images (N, H, W, C) of one shape, at least 11 pixels a side.
        data_range: 255 for 8-bit images, 1 for [0, 1], 2 for [-1, 1].
    Raises: ConfigError if the shapes differ or are too small, or the range is not a positive number.

    >>> x = torch.zeros(1, 11, 11, 1)
    >>> round(ssim(x, x + 255).item(), 8)  # constant images: C1 / (255² + C1)
    9.999e-05
    """
    got, wanted = as_float64(value, "ssim"), as_float64(reference, "ssim")
    check_same_shape(got, wanted, "ssim")
    if got.ndim != 4 or min(got.shape[1:3]) < WINDOW:
        raise ConfigError(
            f"ssim: expected images (N, H, W, C) of at least {WINDOW} pixels a side, got {tuple(got.shape)}. The "
            f"window is {WINDOW} pixels wide. Use psnr for smaller images."
        )
    if not 0 < data_range < float("inf"):
        raise ConfigError(
            f"ssim: expected a positive data_range, got {data_range}. It is the span of the values. Use 255, 1 or 2."
        )
    pairs = zip(got.cpu().split(64), wanted.cpu().split(64), strict=True)
    return torch.cat([_ssim(x.permute(0, 3, 1, 2), y.permute(0, 3, 1, 2), data_range) for x, y in pairs])


def _ssim(x: Tensor, y: Tensor, data_range: float) -> Tensor:
    """Of images (N, C, H, W) in float64."""
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    mean_x, mean_y = _blur(x), _blur(y)
    square_x, square_y, product = mean_x**2, mean_y**2, mean_x * mean_y
    spread_x, spread_y = _blur(x * x) - square_x, _blur(y * y) - square_y
    shared = _blur(x * y) - product
    luminance = (2 * product + c1) / (square_x + square_y + c1)
    structure = (2 * shared + c2) / (spread_x + spread_y + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _blur(images: Tensor) -> Tensor:
    """The Gaussian window at every place where it fits, rows then columns: (N, C, H - 10, W - 10)."""
    offset = torch.arange(WINDOW, dtype=torch.float64) - (WINDOW - 1) / 2
    weights = (-(offset**2) / (2 * SIGMA**2)).exp()
    weights = weights / weights.sum()
    planes = images.flatten(0, 1)[:, None]
    planes = nn.functional.conv2d(planes, weights.view(1, 1, -1, 1))
    return nn.functional.conv2d(planes, weights.view(1, 1, 1, -1)).unflatten(0, images.shape[:2])[:, :, 0]
