"""Images against those of the full-precision model from the same seeds, one by one."""

from __future__ import annotations

import functools
import math
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from modiff.errors import ConfigError
from modiff.evaluate.metrics.bootstrap import Interval, bootstrap
from modiff.evaluate.metrics.small_sample import small_sample_note
from modiff.evaluate.metrics.ssim import WINDOW, ssim
from modiff.evaluate.psnr import psnr
from modiff.evaluate.relative_l2 import check_same_shape

PEAK = 255.0


class PairedErrors(TypedDict):
    """Each with its interval over the images. ssim is None for images smaller than its window of 11 pixels."""

    n: int
    psnr_db: Interval
    ssim: Interval | None
    relative_l2: Interval
    note: str | None


def paired_errors(
    images: Tensor | np.ndarray,
    reference: Tensor | np.ndarray,
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> PairedErrors:
    """PSNR, SSIM and relative L2 of images to full precision, image i of both from seed i.

    PSNR and relative L2 are those of all pixels together, as `psnr` (range 255) and `relative_l2` of the whole arrays:
    one equal pair among many does not make them infinite, and they are smaller than means over images would be. SSIM is
    the mean over images. Intervals resample pairs (percentile).

    Args:
        images, reference: uint8 (N, H, W, C) of one shape, in the order of their seeds.
    Raises: ConfigError for other dtypes or shapes, a reference that is black throughout, or a bad level.

    >>> found = paired_errors(np.full((2, 4, 4, 1), 3, np.uint8), np.full((2, 4, 4, 1), 4, np.uint8))
    >>> found["relative_l2"]["estimate"], round(found["psnr_db"]["estimate"], 2)
    (0.25, 48.13)
    """
    got, wanted = _bytes(images), _bytes(reference)
    check_same_shape(got, wanted, "paired_errors")
    errors, sizes = _energies(got, wanted)
    if not float(sizes.sum()):
        raise ConfigError(
            "paired_errors: expected a reference that is not black throughout, got zeros. An error cannot be a share "
            "of nothing. Look at the reference images."
        )

    def relative(error: Tensor, size: Tensor) -> float:
        return math.sqrt(float(error.sum()) / max(float(size.sum()), 1.0))  # a resample of black images only: size 0

    def mean(values: Tensor) -> float:
        return float(values.mean())

    over_pairs = functools.partial(bootstrap, resamples=resamples, level=level, seed=seed, draw="paired")
    large = min(got.shape[1:3]) >= WINDOW
    return {
        "n": len(got),
        "psnr_db": _decibels(over_pairs(mean, [errors / got[0].numel()])),
        "ssim": over_pairs(mean, [ssim(got, wanted)]) if large else None,
        "relative_l2": over_pairs(relative, [errors, sizes]),
        "note": small_sample_note("mean", len(got)),
    }


def _bytes(images: Tensor | np.ndarray) -> Tensor:
    found = torch.as_tensor(images)
    if found.dtype != torch.uint8 or found.ndim != 4:
        raise ConfigError(
            f"paired_errors: expected uint8 images (N, H, W, C), got {tuple(found.shape)} {found.dtype}. They are "
            "compared as they are saved. Round them to bytes first."
        )
    return found.cpu()


def _energies(images: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Σ (x - y)² and Σ y² of each image, float64 (N,); exact, since bytes are integers."""
    errors, sizes = [], []
    for x, y in zip(images.split(256), reference.split(256), strict=True):
        errors.append((x.double() - y.double()).square().sum(dim=(1, 2, 3)))
        sizes.append(y.double().square().sum(dim=(1, 2, 3)))
    return torch.cat(errors), torch.cat(sizes)


def _decibels(mean_square: Interval) -> Interval:
    """The interval of a mean square error in dB: the order of the ends turns round, and 0 becomes None."""

    def level(value: float | None) -> float | None:
        decibels = psnr(np.array([math.sqrt(value or 0.0)]), np.zeros(1), data_range=PEAK)
        return decibels if math.isfinite(decibels) else None

    low, high = level(mean_square["high"]), level(mean_square["low"])
    return {**mean_square, "estimate": level(mean_square["estimate"]), "low": low, "high": high}
