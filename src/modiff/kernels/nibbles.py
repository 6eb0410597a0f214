"""Two 4-bit codes in a byte, as packed weights keep them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def weight_codes(weight: Tensor, shape: Sequence[int]) -> Tensor:
    """The int8 codes of a weight that is kept as int8, or as uint8 with two codes in each byte of a row.

    The first code of a pair sits in the low half; an odd row ends with a zero. Cost: one pass where packed.

    >>> weight_codes(torch.tensor([[241, 7]], dtype=torch.uint8), (1, 3))
    tensor([[ 1, -1,  7]], dtype=torch.int8)
    """
    if weight.dtype != torch.uint8:
        return weight
    signed = weight.view(torch.int8)
    pairs = torch.stack([(signed << 4) >> 4, signed >> 4], 2)  # the shifts to the right carry the sign
    return pairs.flatten(1)[:, : math.prod(shape[1:])].reshape(tuple(shape))
