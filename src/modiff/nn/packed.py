"""Weights that are integers for good: two 4-bit codes in a byte or one 8-bit code, and a float32 scale per channel.

For anchors a layer may keep 8-bit codes of what rounding took from its weight, W - W_q, as well.
"""

from __future__ import annotations

import math
from typing import Never

import torch
from torch import Tensor

from modiff.core.affine import QParams
from modiff.errors import StateError
from modiff.kernels.layout import weight_codes
from modiff.nn.weight import Part, QuantizedWeight, dense

SCALE, ERROR, ERROR_SCALE = "weight_scale", "weight_error", "weight_error_scale"
"""Names of the buffers of a packed layer: scales of `weight`; codes of its rounding error and their scales."""
PACKED = ("weight", SCALE, ERROR, ERROR_SCALE)
"""Names of all tensors that stand for a packed weight."""
_HALF_BYTE = 4


def packed_storage(
    bits: int, shape: tuple[int, ...], segments: int, *, error: bool
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each tensor that stands for a packed weight; `error`: codes of its rounding error too.

    >>> packed_storage(4, (320, 320, 3, 3), 1, error=False)["weight"]
    (torch.uint8, (320, 1440))
    """
    halves = torch.uint8, (shape[0], -(-math.prod(shape[1:]) // 2))
    scales = torch.float32, (shape[0], segments)
    stored = {"weight": halves if bits <= _HALF_BYTE else (torch.int8, shape), SCALE: scales}
    return stored | {ERROR: (torch.int8, shape), ERROR_SCALE: scales} if error else stored


def pack_nibbles(codes: Tensor) -> Tensor:
    """int8 codes in -8..7, (O, ...) -> uint8 (O, ceil(n / 2)) for rows of n codes: the first in the low half of a byte.

    An odd row ends with a zero.

    >>> pack_nibbles(torch.tensor([[1, -1, 7]], dtype=torch.int8))
    tensor([[241,   7]], dtype=torch.uint8)
    """
    rows = codes.flatten(1)
    if rows.shape[1] % 2:
        rows = torch.nn.functional.pad(rows, (0, 1))
    return ((rows[:, ::2] & 15) | (rows[:, 1::2] << 4)).view(torch.uint8)


class PackedWeight(QuantizedWeight):
    """w ~ scale_o * code_o where only the codes are kept, and unpacked at each use.

    Args:
        was: the weight that was packed.
        shape: of the weight, (O, I / groups, ...).
        buffers: of the layer; scales and error codes are read from it at each use, as they move with the layer.
    """

    def __init__(self, was: QuantizedWeight, shape: tuple[int, ...], buffers: dict[str, Tensor | None]) -> None:
        super().__init__(was.config, was.segments, was.rotation, was.name)
        self.shape, self._buffers = shape, buffers
        self._fixed = ()  # the codes are the weight, and never rounded again

    def codes(self, weight: Tensor) -> tuple[Part, ...]:
        """(int8 codes, scales) for each segment along axis 1, from the packed `weight`."""
        return self._split(weight_codes(weight.detach(), self.shape), SCALE)

    def stored(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The codes as they are kept, and their scales. Raises: StateError without them."""
        return weight.detach(), self._buffer(SCALE)

    def dense(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight that the layer computes with, in `dtype`. Cost: one pass over the codes, two at 4 bits."""
        return dense(self.codes(weight), dtype)

    def exact(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight before rounding as far as it was kept: `dense`, and what the codes of its rounding error say."""
        codes = self._buffers.get(ERROR)
        kept = self.dense(weight, dtype)
        return kept if codes is None else kept + dense(self._split(codes, ERROR_SCALE), dtype)

    def floats(self, weight: Tensor) -> Never:
        """Raises: StateError; the floats are gone."""
        raise StateError(
            f"{self.name}: expected a float weight, got a packed one. Packing keeps the integers alone, and rounding "
            "starts from floats. Do this before modiff.pack, on the full-precision model."
        )

    def fix(self, parts: tuple[Part, ...]) -> Never:
        """Raises: StateError, as `floats`."""
        self.floats(parts[0][0])

    def unfix(self) -> Never:
        """Raises: StateError, as `floats`."""
        self.floats(torch.empty(0))

    def _split(self, codes: Tensor, scale: str) -> tuple[Part, ...]:
        scales = self._buffer(scale).split(1, 1)
        ones = [1] * (len(self.shape) - 2)
        parts = codes.split(self.segments, 1)
        return tuple((c, QParams(s.reshape(-1, 1, *ones), None)) for c, s in zip(parts, scales, strict=True))

    def _buffer(self, name: str) -> Tensor:
        scale = self._buffers.get(name)
        if scale is None:
            raise StateError(f"{self.name}: expected the buffer {name}, got none. A packed weight means nothing "
                             "without its scales. Load the model again.")  # fmt: skip
        return scale


def pack_parts(parts: tuple[Part, ...], bits: int) -> tuple[Tensor, Tensor]:
    """The codes and scales of all segments as they are kept: one tensor of codes, float32 scales (O, segments)."""
    codes = torch.cat([codes for codes, _ in parts], 1)
    scale = torch.stack([q.scale.flatten().float() for _, q in parts], 1)
    return pack_nibbles(codes) if bits <= _HALF_BYTE else codes.contiguous(), scale
