"""Sets of feature vectors as the metrics take them: (N, D), float64, on the CPU, finite."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from modiff.errors import ConfigError


def as_rows(value: Tensor | np.ndarray, where: str) -> Tensor:
    """The feature vectors (N, D) of a set in float64 on the CPU, gradients cut.

    Raises: ConfigError if it is not two-dimensional, holds complex numbers, NaN or infinity, or has no column.
    """
    rows = torch.as_tensor(value).detach()
    if rows.ndim != 2 or rows.shape[1] == 0 or rows.is_complex():
        raise ConfigError(
            f"{where}: expected real feature vectors (N, D), got {tuple(rows.shape)} {rows.dtype}. Each row is one "
            "image. Flatten each image's features to one row."
        )
    rows = rows.to("cpu", torch.float64)
    if not torch.isfinite(rows).all():
        raise ConfigError(
            f"{where}: expected finite features, got NaN or infinity in {_bad(rows)} of {len(rows)} rows. The images "
            "or the extractor are broken. Look at the images of these rows."
        )
    return rows


def check_same_dimension(first: int, second: int, where: str) -> None:
    """Raise the ConfigError of two sets whose vectors have different lengths."""
    if first != second:
        raise ConfigError(
            f"{where}: expected two sets of one dimension, got {first} and {second}. Features of different extractors "
            "cannot be compared. Extract both sets with the same one."
        )


def _bad(rows: Tensor) -> int:
    return int((~torch.isfinite(rows)).any(1).sum())
