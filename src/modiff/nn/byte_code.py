"""The integers of one step as bytes, and the memory layouts that kernels read and write without a copy."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from modiff.kernels.input_fusion import InputFusion
from modiff.kernels.layout import channels_innermost


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


def fronts_of(
    x: Tensor, before: InputFusion | None, segments: tuple[int, ...], channel_dim: int
) -> list[tuple[Tensor, InputFusion | None]]:
    """What is to be coded, for each segment of the channels: a tensor, and what it passes through on the way.

    Cost: where no kernel computes `before` for such segments, torch's operators do it here.
    """
    parts = None if before is None else before.split(x, segments)
    if parts is not None:
        return list(parts)
    value = x if before is None else before.compute(x)
    return [(part, None) for part in dense_parts(value, segments, channel_dim)]


def laid_otherwise(state: Tensor, x: Tensor) -> bool:
    """Whether a state does not lie in memory as x does, which the compiled loops need.

    That of x which is a part of the channels of each pixel, or of a chunk, is dense, and was made so.
    """
    return state.stride() != x.stride() and (x.is_contiguous() or channels_innermost(x, max(x.dim() - 2, 0)))


def innermost(x: Tensor) -> Tensor:
    """The input or output of a convolution with its channels, axis 1, innermost in memory. Cost: nothing, or a copy."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)
