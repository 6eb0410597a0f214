"""Peak signal-to-noise ratio."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from modiff.errors import ConfigError
from modiff.evaluate.relative_l2 import as_float64, check_same_shape


def psnr(value: Tensor | np.ndarray, reference: Tensor | np.ndarray, *, data_range: float = 1.0) -> float:
    """10 log10(data_range² / mean((value - reference)²)) in dB, over all elements together, computed in float64.

    Args:
        value, reference: tensors or arrays of one shape.
        data_range: largest value minus smallest possible value: 1 for images in [0, 1], 255 for 8-bit ones.
    Returns: inf for equal ones; NaN if either holds NaN.
    Raises: ConfigError if the shapes differ, there is nothing to compare, or the range is not a positive number.

    >>> psnr(np.array([0.0, 0.2]), np.array([0.0, 0.0]), data_range=2.0)  # mean square 0.02
    23.010299956639813
    """
    if not (data_range > 0 and math.isfinite(data_range)):
        raise ConfigError(
            f"psnr: expected a positive data_range, got {data_range}. It is the span of the values. Use 1.0 or 255."
        )
    got, wanted = as_float64(value, "psnr"), as_float64(reference, "psnr")
    check_same_shape(got, wanted, "psnr")
    mean_square = float((got - wanted).square().mean())
    if mean_square == 0:
        return math.inf
    return 10 * math.log10(data_range**2 / mean_square)
