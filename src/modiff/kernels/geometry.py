"""How a convolution slides, and the shapes and memory layouts that follow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Geometry(NamedTuple):
    """Stride, padding and dilation of each axis, and groups; no axes: a linear layer."""

    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @property
    def axes(self) -> int:
        """0 for linear layers."""
        return len(self.stride)


def output_shape(codes: Sequence[int], weight: Sequence[int], geometry: Geometry) -> tuple[int, ...]:
    """Shape of the layer's output for codes and a weight of these shapes."""
    if geometry.axes == 0:
        return (*codes[:-1], weight[0])
    spatial = (
        (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, pad, dilation in zip(
            codes[2:], weight[2:], geometry.stride, geometry.padding, geometry.dilation, strict=True
        )
    )
    return (codes[0], weight[0], *spatial)


def empty_output(like: Tensor, shape: Sequence[int], axes: int, dtype: torch.dtype) -> Tensor:
    """An output in the layout of all backends: channels innermost in memory."""
    if axes == 0:
        return like.new_empty(shape, dtype=dtype)
    return like.new_empty((shape[0], *shape[2:], shape[1]), dtype=dtype).movedim(-1, 1)


def channels_innermost(x: Tensor, axes: int) -> bool:
    """Whether the channels of each pixel lie side by side and nothing lies between pixels."""
    if axes == 2:
        return x.is_contiguous(memory_format=torch.channels_last)
    return (x if axes == 0 else x.movedim(1, -1)).is_contiguous()
