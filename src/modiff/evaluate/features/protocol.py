"""What a feature extractor is, and what it returns."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from modiff.errors import ConfigError


class Features(NamedTuple):
    """Of N images, float32 on the CPU, rows in the order of the images.

    pooled: (N, D), for Frechet and kernel distance, precision and recall.
    spatial: (N, D2) as `spatial_rows` makes them, or None if the extractor keeps no positions.
    probabilities: (N, K) of K classes, or None if it does not classify.
    """

    pooled: Tensor
    spatial: Tensor | None
    probabilities: Tensor | None


class FeatureExtractor(Protocol):
    """Turns images into feature vectors; the same image gives the same row in any batch, up to float32 rounding.

    name: goes into the names of all results, so it tells which weights these are.
    dimension: D.
    note, which some have: what to say beside every result, such as the weights' origin; see `note_of`.
    """

    @property
    def name(self) -> str:
        """Which network and weights."""
        ...

    @property
    def dimension(self) -> int:
        """Length of a pooled row."""
        ...

    def __call__(self, images: Tensor) -> Features:
        """Features of images, uint8 (N, H, W, C) in [0, 255], C 1 or 3."""
        ...


def note_of(extractor: FeatureExtractor) -> str | None:
    """What an extractor has to say beside its results; None if nothing."""
    return getattr(extractor, "note", None)


def check_images(images: Tensor, where: str) -> None:
    """Raise a ConfigError unless these are uint8 images (N, H, W, C) with 1 or 3 channels."""
    if not isinstance(images, Tensor):
        raise ConfigError(
            f"{where}: expected a uint8 tensor (N, H, W, C), got {type(images).__name__}. Images come as they are "
            "saved. Give torch.from_numpy(images)."
        )
    if images.ndim != 4 or images.shape[3] not in (1, 3) or not images.numel() or images.dtype != torch.uint8:
        raise ConfigError(
            f"{where}: expected uint8 images (N, H, W, 1 or 3), got {tuple(images.shape)} {images.dtype}. Images come "
            "as they are saved, channels last. Round them to bytes first."
        )
