"""Images for tests of feature extractors."""

from __future__ import annotations

import torch
from torch import Tensor


def noise(seed: int, *shape: int) -> Tensor:
    """uint8 of any shape."""
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
