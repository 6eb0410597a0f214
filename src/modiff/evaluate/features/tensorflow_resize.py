"""The bilinear resize of TensorFlow 1, which the published Inception network was trained and used with."""

from __future__ import annotations

import torch
from torch import Tensor


def tensorflow_resize(images: Tensor, size: int) -> Tensor:
    """Images (N, C, H, W), float, to (N, C, size, size), as `tf.image.resize_bilinear(align_corners=False)` did.

    Output pixel i is taken at i * H / size: pixel corners are aligned at the top left and not at the bottom right,
    unlike `interpolate(..., align_corners=False)` of torch, which takes it at (i + 1/2) H / size - 1/2. Beyond the last
    pixel the border is repeated; nothing is smoothed before shrinking.

    >>> tensorflow_resize(torch.tensor([[[[0.0, 2.0], [0.0, 2.0]]]]), 4)[0, 0, 0].tolist()
    [0.0, 1.0, 2.0, 2.0]
    """
    return _along(_along(images, 3, size), 2, size)


def _along(images: Tensor, dim: int, size: int) -> Tensor:
    """Linear interpolation of one axis."""
    length = images.shape[dim]
    place = torch.arange(size, dtype=images.dtype, device=images.device) * (length / size)
    below = place.long().clamp_max(length - 1)
    above = (below + 1).clamp_max(length - 1)
    share = (place - below).view(-1, *[1] * (images.ndim - 1 - dim))
    low = images.index_select(dim, below)
    return low + (images.index_select(dim, above) - low) * share
