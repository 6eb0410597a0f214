"""Integer sums on float32 hardware: exact while they stay below 2^24, so longer ones are cut into chunks.

For processors without VNNI, where oneDNN's integer kernels saturate and `torch._int_mm` takes 50 times as long.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from modiff.kernels.layout import Geometry
from modiff.kernels.prepacked import PREPACKED
from modiff.kernels.problem import Call

EXACT = 2**24
"""float32 holds every integer up to this one, so no partial sum is rounded, in whatever order it is made."""


def chunk_of(bits: int, weight_max: int, kernel_size: tuple[int, ...]) -> int:
    """Input channels of a group that one float32 sum may take; 0 if even one is too many.

    >>> chunk_of(8, 128, ()), chunk_of(8, 128, (3, 3)), chunk_of(4, 127, ())
    (1024, 113, 16512)
    """
    return EXACT // (2 ** (bits - 1) * max(weight_max, 1) * math.prod(kernel_size))


def sums(call: Call) -> Tensor:
    """sum (code - zero point) * weight code, exact: float32 where one chunk takes all channels, else int32."""
    geometry, channels = call.geometry, call.shape[1]
    chunk = chunk_of(call.bits, call.weight_max, call.shape[2:])
    pieces = PREPACKED.get(call.weight, ("float_exact", call.shape, chunk), lambda: _pieces(call.weight_codes(), chunk))
    values = call.codes.to(torch.float32).sub_(call.zero_point)
    if len(pieces) == 1:
        return _product(values, pieces[0], geometry)
    grouped = values.unflatten(1, (geometry.groups, channels)) if geometry.axes else values
    total = torch.zeros((), dtype=torch.int32)
    for index, piece in enumerate(pieces):
        width = piece.shape[1]
        if geometry.axes:
            part = grouped.narrow(2, index * chunk, width).flatten(1, 2)
        else:
            part = grouped.narrow(-1, index * chunk, width)
        found = _product(part, piece, geometry).to(torch.int32)
        total = found if index == 0 else total.add_(found)
    return total


def scaled(call: Call) -> Tensor:
    """weight scale * sums, float32: what is left is the scale of the codes."""
    return sums(call).to(torch.float32).mul_(call.weight_scale)


def accumulate(output: Tensor, call: Call) -> None:
    """output += scale * weight scale * sums, in float32, rounded once to the dtype of `output`."""
    add_scaled(output, scaled(call), call.scale)


def add_scaled(output: Tensor, sent: Tensor, scale: Tensor) -> None:
    """output += scale * sent; `sent` (float32) may be overwritten."""
    if output.dtype == sent.dtype:
        output.addcmul_(sent, scale)
    else:
        output.add_(sent.mul_(scale))


def _pieces(weight: Tensor, chunk: int) -> tuple[Tensor, ...]:
    return tuple(part.to(torch.float32).contiguous() for part in weight.split(chunk, 1))


def _product(values: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    if geometry.axes == 0:
        return functional.linear(values, weight)
    # not functional.conv2d: with oneDNN switched off it may take Winograd's algorithm, which rounds
    return torch.ops.aten.mkldnn_convolution(
        values, weight, None, geometry.padding, geometry.stride, geometry.dilation, geometry.groups
    )
