"""Features of a whole set of images, read a batch at a time."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from modiff.errors import ConfigError
from modiff.evaluate.features.protocol import FeatureExtractor, Features

BATCH = 64


def extract(
    extractor: FeatureExtractor, batches: Iterable[np.ndarray | Tensor], *, batch_size: int = BATCH
) -> Features:
    """The features of all images, in order.

    Args:
        batches: uint8 arrays (n, H, W, C) of any n, as `read_images` gives them; an array of all images in a list.
        batch_size: images at once through the network.
    Raises: ConfigError if there are no images, or as the extractor.
    Memory: 4 (D + D2 + K) bytes an image beside the largest batch.
    """
    found = [extractor(part) for batch in batches for part in torch.as_tensor(batch).split(batch_size)]
    if not found:
        raise ConfigError("extract: expected images, got none. The set is empty. Check the folder of the images.")
    return Features(
        torch.cat([part.pooled for part in found]),
        _joined([part.spatial for part in found]),
        _joined([part.probabilities for part in found]),
    )


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if len(present) == len(parts) else None
