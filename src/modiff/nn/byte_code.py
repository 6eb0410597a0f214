"""The integers of one step as bytes, and the memory layouts that kernels read and write without a copy."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from modiff.kernels.geometry import channels_innermost


class ByteCode(NamedTuple):
    """The integers of one step as kernels read them.

    parts: for each segment of the channels (uint8 codes, their scales, float32); `zero` is the byte that stands for 0.
    """

    parts: tuple[tuple[Tensor, Tensor], ...]
    zero: int
    channel_dim: int

    def value(self) -> Tensor:
        """What the codes stand for, float32: bit for bit that of the simulation."""
        values = [(codes.to(torch.float32) - self.zero) * scale for codes, scale in self.parts]
        return values[0] if len(values) == 1 else torch.cat(values, self.channel_dim)


def dense_parts(x: Tensor, segments: tuple[int, ...], channel_dim: int) -> tuple[Tensor, ...]:
    """The segments of x along its channels, each dense in memory, channels innermost where x has them so.

    Cost: nothing for one segment, else a copy of x.
    """
    if len(segments) == 1:
        return (x,)
    parts = x.split(list(segments), channel_dim)
    if channel_dim == 1 and channels_innermost(x, x.dim() - 2):
        return tuple(innermost(part) for part in parts)
    return tuple(part.contiguous() for part in parts)


def innermost(x: Tensor) -> Tensor:
    """The input or output of a convolution with its channels, axis 1, innermost in memory. Cost: nothing, or a copy."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)
