"""Does oneDNN add up right on this machine? Asked once per process, with codes that make a wrong one fail."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from modiff.kernels import onednn, reference
from modiff.kernels.layout import Geometry
from modiff.kernels.problem import Call

_CONVOLUTION = Geometry((1, 1), (1, 1), (1, 1))
_WORST = ((8, 64), (7, 128), (4, 128))
"""(bits, largest weight code) that just stay below the 16 bits of a pair of products."""


class Trust(NamedTuple):
    """What the test found. bounded: right where no pair of products can saturate 16 bits. full: right for all codes."""

    bounded: bool = True
    full: bool = True
    detail: str = ""


@functools.cache
def trust() -> Trust:
    """Run the test, or give what it found before. Cost: under a millisecond."""
    try:
        bounded = all(_right(call) for bits, weight in _WORST for call in _calls(bits, weight))
        return Trust(bounded, bounded and all(_right(call) for call in _calls(8, 128)))
    except (RuntimeError, AttributeError) as error:
        return Trust(bounded=False, full=False, detail=str(error).splitlines()[0])


def _right(call: Call) -> bool:
    return torch.equal(onednn.sums(call).double(), reference.sums(call))


def _calls(bits: int, weight: int) -> Iterator[Call]:
    """All-largest codes beside alternating signs, for each kind of layer."""
    top, one = 2**bits - 1, torch.ones((), dtype=torch.float32, device="cpu")
    for shape, geometry, size in (
        ((24, 64), Geometry(), (5, 64)),
        ((17, 131), Geometry(), (33, 131)),
        ((16, 32, 3, 3), _CONVOLUTION, (1, 32, 5, 5)),
        ((7, 5, 3, 3), _CONVOLUTION, (2, 5, 4, 4)),
    ):
        codes = torch.full(size, top, dtype=torch.uint8, device="cpu")
        codes[0] //= 2
        weights = torch.full(shape, -weight, dtype=torch.int8, device="cpu")
        weights[::2] = min(weight, 127)
        scales = torch.ones(shape[0], *[1] * geometry.axes, dtype=torch.float32, device="cpu")
        yield Call(codes, weights, shape, scales, one, geometry, bits, weight)
