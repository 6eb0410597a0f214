"""A tensor as rows that share a scale: the one shape that the compiled input sides know."""

from __future__ import annotations

import functools
import math

from torch import Tensor

from modiff.config import Granularity
from modiff.core.affine import reduced_dims


def scale_shape(x: Tensor, granularity: Granularity, channel_dim: int) -> tuple[int, ...]:
    """Shape of the scales of x: the axes that share one are 1."""
    shared = reduced_dims(x.dim(), granularity, channel_dim)
    return tuple(1 if axis in shared else size for axis, size in enumerate(x.shape))


def as_rows(x: Tensor, granularity: Granularity, channel_dim: int) -> Tensor | None:
    """x as (scales, elements that share one), a view of the same memory; None where its layout has no such view.

    The rows come in the order of the flattened scales. "tensor" and "sample" take both memory layouts of
    convolutions; "token" needs the channels of a token side by side.
    """
    shape = row_shape(x, granularity, channel_dim)
    return None if shape is None else x.as_strided(shape, (shape[1], 1))


def row_shape(x: Tensor, granularity: Granularity, channel_dim: int) -> tuple[int, int] | None:
    """The shape of `as_rows`."""
    return _row_shape(x.shape, x.stride(), granularity, channel_dim)


@functools.lru_cache(4096)  # asked at every call of every layer, for a few layouts
def _row_shape(
    shape: tuple[int, ...], strides: tuple[int, ...], granularity: Granularity, channel_dim: int
) -> tuple[int, int] | None:
    dims, numel = len(shape), math.prod(shape)
    rows = _contiguous(shape, strides)
    innermost = dims > 2 and _contiguous((shape[0], *shape[2:], shape[1]), (strides[0], *strides[2:], strides[1]))
    if not (rows or innermost) or numel == 0:
        return None
    if granularity == "tensor":
        count = numel
    elif granularity == "sample":
        count = numel // (shape[0] if dims > 1 else 1)
    elif granularity == "token":
        last = channel_dim % dims == dims - 1
        if not (rows if last else channel_dim % dims == 1 and innermost):
            return None
        count = shape[channel_dim]
    else:
        return None
    return numel // count, count


def pixel_pitch(x: Tensor) -> int | None:
    """Elements from pixel to pixel of (N, C, ...) whose channels lie side by side; None in any other layout."""
    return _pixel_pitch(x.shape, x.stride())


@functools.lru_cache(4096)
def _pixel_pitch(shape: tuple[int, ...], strides: tuple[int, ...]) -> int | None:
    if len(shape) < 3 or (shape[1] > 1 and strides[1] != 1):
        return None
    steps = list(zip((shape[0], *shape[2:]), (strides[0], *strides[2:]), strict=True))
    pitch = expected = next((stride for size, stride in reversed(steps) if size > 1), shape[1])
    for size, stride in reversed(steps):
        if size > 1 and stride != expected:
            return None
        expected *= size
    return pitch if pitch >= shape[1] else None


def _contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """As `Tensor.is_contiguous`: the stride of an axis of size 1 means nothing."""
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
