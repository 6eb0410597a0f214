"""One use of a kernel, in the form that all backends read."""

from __future__ import annotations

import functools
from typing import NamedTuple

from torch import Tensor

from modiff.kernels.geometry import Geometry, output_shape
from modiff.kernels.nibbles import weight_codes


class Call(NamedTuple):
    """codes: uint8, channels last for linear layers and at axis 1 for convolutions, zero = 2^(bits - 1).

    weight: int8 codes, or uint8 with two 4-bit codes in a byte; shape: of the codes.
    weight_scale: (outputs, 1, ...). scale: of the codes, broadcastable to the output.
    weight_max: largest magnitude among the weight codes.
    """

    codes: Tensor
    weight: Tensor
    shape: tuple[int, ...]
    weight_scale: Tensor
    scale: Tensor
    geometry: Geometry
    bits: int
    weight_max: int

    @property
    def zero_point(self) -> int:
        """The byte that stands for zero."""
        return 2 ** (self.bits - 1)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Of the layer's output."""
        return _output_shape(self.codes.shape, self.shape, self.geometry)

    def weight_codes(self) -> Tensor:
        """The int8 codes of the weight, (outputs, inputs / groups, ...)."""
        return weight_codes(self.weight, self.shape)


_output_shape = functools.lru_cache(4096)(output_shape)
