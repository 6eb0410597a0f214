"""Spatial Frechet distance: features that keep their position in the image, instead of their average over it."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from modiff.errors import ConfigError
from modiff.evaluate.metrics.frechet_distance import frechet_distance
from modiff.evaluate.metrics.moments import Moments

CHANNELS = 7
"""Channels kept, the first ones: 7 * 17 * 17 = 2023 numbers of Inception, about as many as its 2048 averages."""


def spatial_rows(maps: Tensor) -> Tensor:
    """The first 7 channels of feature maps (N, C, H, W) at every position, one row an image: (N, min(C, 7) H W).

    The convention of sFID (Nash et al. 2021, arXiv:2103.03841; kept by the ADM suite), where the maps are those of
    Inception's block Mixed_6d, branch 1x1, after its ReLU. Another extractor says in its docstring which maps it takes.
    Raises: ConfigError if the maps are not four-dimensional.
    """
    if maps.ndim != 4:
        raise ConfigError(
            f"spatial_rows: expected feature maps (N, C, H, W), got {tuple(maps.shape)}. Positions must still be "
            "there. Give a layer's output before it is averaged."
        )
    return maps[:, :CHANNELS].flatten(1)


def spatial_frechet_distance(first: Moments | Tensor | np.ndarray, second: Moments | Tensor | np.ndarray) -> float:
    """`frechet_distance` of spatial rows (N, D2), or of their moments.

    It sees where things are: shuffled image parts leave averaged features as they are and change these.
    Raises, units and cost: as for `frechet_distance`, with D2 in the place of D.

    >>> rows = np.eye(3)
    >>> round(spatial_frechet_distance(rows, rows + 1), 6)
    3.0
    """
    return frechet_distance(_moments(first), _moments(second))


def _moments(value: Moments | Tensor | np.ndarray) -> Moments:
    return value if isinstance(value, Moments) else Moments.of(value)
