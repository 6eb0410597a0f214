"""How tensors lie in memory, and how a convolution slides over them."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from modiff.core.affine import qrange, unsent
from modiff.core.granularity import granularity_named
from modiff.errors import KernelError
from modiff.kernels.native import BLOCK


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


@functools.lru_cache(4096)  # asked at every call of every layer, for a few shapes
def output_shape(codes: tuple[int, ...], weight: tuple[int, ...], geometry: Geometry) -> tuple[int, ...]:
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
    if axes == 2:  # the same in one operator
        return torch.empty(shape, dtype=dtype, device=like.device, memory_format=torch.channels_last)
    return like.new_empty((shape[0], *shape[2:], shape[1]), dtype=dtype).movedim(-1, 1)


def innermost(x: Tensor) -> Tensor:
    """The input or output of a convolution with its channels, axis 1, innermost in memory. Cost: nothing, or a copy."""
    if x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def channels_innermost(x: Tensor, axes: int) -> bool:
    """Whether the channels of each pixel lie side by side and nothing lies between pixels."""
    return is_innermost(x.shape, x.stride(), axes)


def is_innermost(shape: tuple[int, ...], strides: tuple[int, ...], axes: int) -> bool:
    """`channels_innermost` of a tensor of this shape and these strides."""
    if axes == 0:
        return _contiguous(shape, strides)
    return _contiguous((shape[0], *shape[2:], shape[1]), (strides[0], *strides[2:], strides[1]))


class EncodeLayout(NamedTuple):
    """What encoding an input of one shape and memory layout needs to know, once for all its steps.

    scales: their shape. rows: (how many, elements in each) that share a scale and lie side by side, in the order of the
    flattened scales; None: not so. "tensor" and "sample" have rows in both memory layouts of convolutions.
    blocks: how many partial maxima the compiled loop needs. factor: clip / qmax.
    unsent: as `core.affine.unsent`.
    """

    bits: int
    clip: float
    granularity: str
    channel_dim: int
    scales: tuple[int, ...]
    rows: tuple[int, int] | None
    blocks: int
    qmin: int
    qmax: int
    factor: float
    unsent: float


@functools.lru_cache(4096)  # asked at every call of every layer, for a few layouts
def layout_of(
    shape: tuple[int, ...], strides: tuple[int, ...], bits: int, clip: float, granularity: str, channel_dim: int
) -> EncodeLayout:
    """Raises: KernelError for a granularity that has no integer sums."""
    if granularity not in ("tensor", "sample", "token"):
        raise KernelError(
            f"encode: expected granularity 'tensor', 'sample' or 'token', got {granularity!r}. A scale along the "
            "summed axis has no integer sums. Choose one of the three."
        )
    dims, numel, axis = len(shape), math.prod(shape), channel_dim % len(shape)
    innermost = dims > 2 and is_innermost(shape, strides, dims - 2)
    if granularity == "token" and axis != dims - 1:
        dense = axis == 1 and innermost
    else:
        dense = _contiguous(shape, strides) or (innermost and granularity != "token")
    rows = None
    if dense and numel:
        sample = numel // shape[0] if dims > 1 else numel
        count = {"tensor": numel, "sample": sample, "token": shape[axis]}[granularity]
        rows = (numel // count, count)
    blocks, (qmin, qmax) = 0 if rows is None or rows[1] <= BLOCK else rows[0] * -(-rows[1] // BLOCK), qrange(bits)
    shared = granularity_named(granularity).reduced_dims(len(shape), channel_dim)
    scales = tuple(1 if axis in shared else size for axis, size in enumerate(shape))
    factors = clip / qmax, unsent(bits, clip)
    return EncodeLayout(bits, clip, granularity, channel_dim, scales, rows, blocks, qmin, qmax, *factors)


@functools.lru_cache(4096)
def pixel_pitch(shape: tuple[int, ...], strides: tuple[int, ...]) -> int | None:
    """Elements from pixel to pixel of (N, C, ...) whose channels lie side by side; None in any other layout."""
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
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


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
