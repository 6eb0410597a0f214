"""Weights that are integers for good: two 4-bit codes in a byte or one 8-bit code, and a float32 scale per channel.

For anchors a layer may keep 8-bit codes of what rounding took from its weight, W - W_q, as well.
"""

from __future__ import annotations

import math
from typing import Any, Never

import torch
from torch import Tensor

from modiff.core.affine import QParams
from modiff.core.hadamard import rotate
from modiff.errors import StateError
from modiff.kernels.layout import weight_codes
from modiff.nn.weight import QuantizedWeight, WeightCodes, dense, turned

SCALE, ERROR, ERROR_SCALE = "weight_scale", "weight_error", "weight_error_scale"
"""Names of the buffers of a packed layer: scales of `weight`; codes of its rounding error and their scales."""
PACKED = ("weight", SCALE, ERROR, ERROR_SCALE)
"""Names of all tensors that stand for a packed weight."""
_HALF_BYTE = 4


def packed_storage(
    bits: int, shape: tuple[int, ...], ranges: int, *, error: bool
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each tensor of a packed weight with `ranges` scales a row; `error`: those of anchor codes too.

    >>> packed_storage(4, (320, 320, 3, 3), 1, error=False)["weight"]
    (torch.uint8, (320, 1440))
    """
    halves = torch.uint8, (shape[0], -(-math.prod(shape[1:]) // 2))
    scales = torch.float32, (shape[0], ranges)
    stored = {"weight": halves if bits <= _HALF_BYTE else (torch.int8, shape), SCALE: scales}
    return stored | {ERROR: (torch.int8, shape), ERROR_SCALE: scales} if error else stored


def pack_nibbles(codes: Tensor) -> Tensor:
    """int8 codes in -8..7, (O, ...) -> uint8 (O, ceil(n / 2)) for rows of n codes: the first in the low half of a byte.

    >>> pack_nibbles(torch.tensor([[1, -1, 7]], dtype=torch.int8))
    tensor([[241,   7]], dtype=torch.uint8)
    """
    rows = codes.flatten(1)
    if rows.shape[1] % 2:
        rows = torch.nn.functional.pad(rows, (0, 1))
    return ((rows[:, ::2] & 15) | (rows[:, 1::2] << 4)).view(torch.uint8)


class PackedWeight(QuantizedWeight):
    """w ~ scale_o * code_o where only the codes are kept, and unpacked at each use, whatever weight is given.

    shape: (O, I / groups, ...). dtype: that the weight had, and has for those who read it. tensors: the dictionaries of
    the layer's parameters and buffers, which hold codes and scales.
    """

    def __init__(self, was: QuantizedWeight, shape: tuple[int, ...], dtype: torch.dtype, *tensors: Any) -> None:
        super().__init__(was.config, was.columns, was.rotation, was.name, was.transposed)
        self.shape, self.dtype, (self._parameters, self._buffers) = shape, dtype, tensors
        self.fixed = True  # the codes are the weight, and never rounded again

    def refresh(self, weight: Tensor) -> int:
        """Codes do not change."""
        return 0

    def codes(self, weight: Tensor | None = None) -> tuple[WeightCodes, ...]:
        """(int8 codes, scales) for each range of columns."""
        return self._split(weight_codes(self.stored()[0], self.shape), SCALE)

    def stored(self) -> tuple[Tensor, Tensor]:
        """The codes as they are kept, and their scales."""
        return self._parameters["weight"].detach(), self.buffer(SCALE)

    def buffer(self, name: str) -> Tensor:
        """A tensor of the weight other than its codes. Raises: StateError without it."""
        if (value := self._buffers.get(name)) is None:
            raise StateError(f"{self.name}: expected the buffer {name}, got none. Codes mean nothing without their "
                             "scales. Load the model again.")  # fmt: skip
        return value

    def dense(self, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The weight that the layer computes with, in `dtype`. Cost: one pass over the codes, two at 4 bits."""
        return dense(self.codes(), dtype)

    def exact(self, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The weight before rounding as far as it was kept: `dense`, and what the codes of its rounding error say."""
        codes, rounded = self._buffers.get(ERROR), self.dense(weight, dtype)
        return rounded if codes is None else rounded + dense(self._split(codes, ERROR_SCALE), dtype)

    def readable(self) -> Tensor:
        """What the layer's codes stand for, as a float weight that cannot be written."""
        values = self.dense(None, torch.float32)
        values = values if self.rotation is None else rotate(values, self.rotation, 1)
        values = turned(values, self.transposed).to(self.dtype).as_subclass(_ReadOnly)
        values.refuse, values._is_param = self.floats, True  # torch's sign that a tensor is an nn.Parameter
        return values

    def floats(self, *_: object) -> Never:
        """Raises: StateError; the floats are gone."""
        raise StateError(
            f"{self.name}: expected a float weight, got a packed one. Packing keeps the integers alone, and rounding "
            "starts from floats. Do this before modiff.pack, on the full-precision model."
        )

    fix = unfix = floats

    def _split(self, codes: Tensor, scale: str) -> tuple[WeightCodes, ...]:
        scales = self.buffer(scale).reshape(len(codes), -1, *[1] * (codes.dim() - 2)).split(1, 1)
        return tuple((c, QParams(s, None)) for c, s in zip(codes.split(self.columns, 1), scales, strict=True))


class _ReadOnly(Tensor):
    """Floats that codes stand for: writing them would change nothing, and raises StateError."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        if name in ("__set__", "__setitem__") or name.startswith("__i") or (name[-1] == "_" and name[-2] != "_"):
            args[0].refuse()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs or {})


def pack_codes(codes: tuple[WeightCodes, ...], bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scales as they are kept: one tensor of codes, float32 scales (O, ranges of columns)."""
    joined = torch.cat([each for each, _ in codes], 1)
    scale = torch.stack([q.scale.flatten().float() for _, q in codes], 1)
    return pack_nibbles(joined) if bits <= _HALF_BYTE else joined.contiguous(), scale
