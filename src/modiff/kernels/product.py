"""The backend of our own for CPUs: products of few bits summed in 16 bits, with the output side in the same loop.

A step adds to the state and writes the layer's output while the sums are in registers, for any scale, and a
convolution reads the codes once, with no copy for each tap of its kernel. csrc/product.cpp and csrc/tile.h.
"""

import functools
import math
from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from modiff.kernels import native
from modiff.kernels.backend import PREPACKED, Backend, Operator, Step
from modiff.kernels.epilogue import Integers, in_rows
from modiff.kernels.isa import Isa
from modiff.kernels.layout import innermost, is_innermost, output_shape
from modiff.kernels.native import KINDS
from modiff.kernels.problem import LARGEST_INT16, LARGEST_INT32, Problem

_GROUP = 4
_AVX2 = 1
_SHORT = 3
"""Groups of inputs between two flushes below which sums in 32 bits take less time."""
_LEVELS = ("avx2", "avx512", "avx2_vnni", "avx512_vnni")
"""Where they take less time than oneDNN (bench/products.py)."""
_SUMS, _ACCUMULATE, _STEP, _COMPUTE = range(4)
_LOOK = 512


class NativeLoops(Backend):
    """u8 x s8 products, compiled for the processor: VNNI where there is one, otherwise AVX2.

    Without VNNI sums stay in 16 bits for as many products as the weights and the bits allow (`windows`); where that is
    too few, as at W8A8, codes are widened. Cost: a copy of the weight's codes in the order of the loops, as many bytes.
    """

    name = "native"
    devices = ("cpu",)

    def unsupported(self, problem: Problem, isa: Isa) -> str:
        """Why it does not run the problem; empty if it does."""
        if len(problem.kernel_size) > 2:
            return "the compiled loops slide along at most two axes"
        if problem.groups > 1 and problem.inputs // problem.groups < _GROUP:
            return f"groups of {problem.inputs // problem.groups} channels leave the compiled loops idle"
        if problem.largest_sum > LARGEST_INT32:
            return f"a sum of {problem.summed} products may pass 32 bits"
        if isa.level not in _LEVELS:
            return f"the compiled loops are made for {' and '.join(_LEVELS)}, this is {isa.level}"
        library, reason = native.load_library("product")
        return reason if library is None else ""

    def reason(self, problem: Problem, isa: Isa) -> str:
        """One line for the report: how sums are made."""
        if isa.sums_in_int32:
            return f"compiled loops with {isa.level}, sums in 32 bits"
        return "compiled loops with AVX2, sums in 16 bits as long as the weights let no code overflow them"

    def sums(self, operator: Operator, codes: Tensor) -> Tensor:
        """sum (code - zero point) * weight code, int32."""
        output = operator.new_output(codes, torch.int32)
        _run(_SUMS, operator, codes, None, None, output)
        return output

    def accumulate(self, operator: Operator, output: Tensor, codes: Tensor, scale: Tensor) -> None:
        """output += scale * weight scale * sums, in the loop that makes the sums."""
        if output.dtype != torch.float32 or not in_rows(operator.axes, scale.shape, output):
            super().accumulate(operator, output, codes, scale)
        else:
            _run(_ACCUMULATE, operator, codes, scale, None, output)

    def step(
        self, operator: Operator, state: Tensor, codes: Tensor, scale: Tensor, output: Tensor, integers: Integers = None
    ) -> None:
        """`accumulate`, and the new state into `output`, in the loop that makes the sums."""
        if step := self.prepared_step(operator, state, codes, scale, output, integers):
            step(state, codes, scale, output, integers)
        else:
            super().step(operator, state, codes, scale, output, integers)

    def prepared_step(
        self, operator: Operator, state: Tensor, codes: Tensor, scale: Tensor, output: Tensor, integers: Integers
    ) -> Step | None:
        """None where the loops do not know the types or layouts."""
        known = state.dtype == (torch.float32 if integers is None else torch.int16) and output.dtype in KINDS
        dense = is_innermost(codes.shape, codes.stride(), operator.axes) and scale.is_contiguous()
        if not (known and dense and scale.dtype == torch.float32) or not in_rows(
            operator.axes, scale.shape, state, output
        ):
            return None
        fixed, each = _fixed(operator, codes.shape), output.numel() // operator.shape[0] // scale.numel()
        return functools.partial(_call, fixed, _STEP, each, None)

    def compute(
        self, operator: Operator, codes: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """scale * weight scale * sums + bias."""
        output = operator.new_output(codes, dtype)
        if dtype not in KINDS or not in_rows(operator.axes, scale.shape, output):
            return super().compute(operator, codes, scale, bias, dtype)
        _run(_COMPUTE, operator, codes, scale, bias, output)
        return output


def family() -> int:
    """What the loops were compiled for: 0 plain C++, 1 AVX2, 2 AVX-VNNI, 3 AVX-512 VNNI. Needs the library."""
    library = native.load_library("product").library
    return 0 if library is None else int(library.modiff_family())


def _run(mode: int, operator: Operator, codes: Tensor, scale: Tensor | None, bias: Tensor | None, out: Tensor) -> None:
    codes = codes.contiguous() if operator.axes == 0 else innermost(codes)
    scale = None if scale is None else scale.to(torch.float32).contiguous()
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    each = 1 if scale is None else out.numel() // operator.shape[0] // scale.numel()
    _call(_fixed(operator, codes.shape), mode, each, bias, out if mode == _ACCUMULATE else None, codes, scale, out)


class _Fixed(NamedTuple):
    """The arguments of csrc/product.cpp that belong to a weight and a shape of codes, and the tensors they lie in."""

    tensors: tuple[Tensor, ...]
    first: tuple[int, ...]
    second: tuple[int, ...]


def _fixed(operator: Operator, codes: torch.Size) -> _Fixed:
    key = ("native", operator.shape, operator.geometry, operator.bits)
    tensors = PREPACKED.get(operator.weight, (*key, codes), lambda: _prepared(operator, key, codes))
    shape, stretches, packed, zeros, wide = tensors
    first = (shape.data_ptr(), operator.zero_point, int(wide), stretches.data_ptr(), len(stretches),
             packed.data_ptr(), int(packed.dtype == torch.uint8))  # fmt: skip
    return _Fixed((*tensors, operator.weight_scale), first, (zeros.data_ptr(), operator.weight_scale.data_ptr()))


def _call(
    fixed: _Fixed, mode: int, each: int, bias: Tensor | None, state: Tensor | None, codes: Tensor,
    scale: Tensor | None, out: Tensor, integers: Integers = None,
) -> None:  # fmt: skip
    """each: pixels or tokens that share a scale."""
    grid, clipped = (None, None) if integers is None else (integers[0].data_ptr(), integers[1].data_ptr())
    native.load_library("product").library.modiff_product(
        codes.data_ptr(), *fixed.first, mode, None if state is None else state.data_ptr(), grid, clipped,
        *fixed.second, None if scale is None else scale.data_ptr(), each, None if bias is None else bias.data_ptr(),
        out.data_ptr(), KINDS.get(out.dtype, 0), torch.get_num_threads(),
    )  # fmt: skip


def _prepared(operator: Operator, key: Hashable, codes: torch.Size) -> tuple[Tensor, ...]:
    """What the loops read for codes of one shape: their layout, and the weight as all shapes share it."""
    packed, zeros, ends, wide = PREPACKED.get(operator.weight, key, lambda: _pack(operator))
    return *_layout(operator, codes, ends.tolist(), bool(wide)), packed, zeros, wide


def _pack(operator: Operator) -> tuple[Tensor, ...]:
    """(codes in the order of the loops, zero * sum of an output's weights, ends of windows, whether codes are widened).

    Two 4-bit codes share a byte, uint8, where the weight came so.
    """
    codes, g = operator.weight_codes(), operator.geometry.groups
    taps = codes.reshape(g, codes.shape[0] // g, codes.shape[1], -1)
    tile = native.load_library("product").library.modiff_outputs()
    taps = pad(taps, (0, 0, 0, -taps.shape[2] % _GROUP, 0, -taps.shape[1] % tile))
    # (groups, tiles, outputs, groups of inputs, inputs of one, taps) -> (groups, tiles, taps, groups of inputs, ...)
    grouped = taps.unflatten(1, (-1, tile)).unflatten(3, (-1, _GROUP)).permute(0, 1, 5, 3, 2, 4)
    lanes = grouped.permute(0, 1, 4, 2, 3, 5).flatten(0, 2).flatten(1, 2).unflatten(2, (2, 2))
    ends, wide = torch.tensor([lanes.shape[1]]), family() == _AVX2
    if wide:
        ends = windows(lanes, 2**operator.bits - 1)
        wide = len(ends) == 0 or len(ends) * _SHORT > lanes.shape[1]
    zeros = operator.zero_point * codes.flatten(1).sum(1, dtype=torch.int32)
    if wide:
        grouped = taps.unflatten(1, (-1, tile)).unflatten(3, (-1, 2)).permute(0, 1, 5, 3, 2, 4)
        return grouped.contiguous(), torch.zeros_like(zeros), ends, torch.tensor(True)
    packed = grouped.contiguous()
    if operator.weight.dtype == torch.uint8:
        first, second = packed.flatten(4).chunk(2, 4)
        packed = ((first & 15) | (second << 4)).view(torch.uint8).contiguous()
    return packed, zeros, ends, torch.tensor(False)


def windows(lanes: Tensor, largest_byte: int) -> Tensor:
    """Where 16-bit sums must be flushed into 32 bits: the ends of the longest windows that no codes can overflow.

    A lane adds up largest_byte * w over its positive weights at most, and over its negative ones at least:

        largest_byte * max(sum of w > 0, sum of |w < 0|) <= 2^15 - 1       for every output, lane and window

    Args:
        lanes: int8 weight codes, (outputs, groups of inputs, 2 lanes, 2 inputs), in the order in which they are added.
    Returns: the ends, int64; none where one group alone may overflow.
    """
    w = lanes.to(torch.int32)
    sums = torch.stack([w.clamp_min(0).sum(3), w.clamp_max(0).neg().sum(3)])  # (2, outputs, groups, 2)
    total = sums.permute(2, 0, 1, 3).flatten(1).cumsum(0) * largest_byte  # (groups, all lanes)
    ends: list[int] = []
    start, groups = 0, len(total)
    while start < groups:
        before = total[start - 1] if start else torch.zeros_like(total[0])
        most = (total[start : start + _LOOK] - before).amax(1)
        length = int((most <= LARGEST_INT16).sum())
        if length == 0:
            return torch.tensor([], dtype=torch.int64)
        start += length
        ends.append(start)
    return torch.tensor(ends)


def _layout(operator: Operator, codes: torch.Size, ends: list[int], wide: bool) -> tuple[Tensor, Tensor]:
    """The shape that csrc/product.cpp reads, and the stretches of a row: (offset in bytes, groups, flush)."""
    g, inputs = operator.geometry, operator.shape[1]
    n, height, width = (1, 1, math.prod(codes[:-1])) if operator.axes == 0 else (codes[0], *codes[2:])
    tall, broad = output_shape(codes, operator.shape, g)[2:] if operator.axes else (1, width)
    stride, padding, dilation = (g.stride, g.padding, g.dilation) if operator.axes else ((1, 1), (0, 0), (1, 1))
    shape = (n, height, width, g.groups, inputs, operator.shape[0] // g.groups, tall, broad, *stride, *padding)
    padded, size, each = -(-inputs // _GROUP) * _GROUP, (2 if wide else 1), (2 if wide else _GROUP)
    line, pixel = (width + 2 * padding[1]) * g.groups * padded * size, g.groups * padded * size
    kernel = operator.shape[2:] if operator.axes else (1, 1)
    stretches: list[list[int]] = []
    cuts, at = set(() if wide else ends), 0
    for y in range(kernel[0]):
        for x in range(kernel[1]):
            for group in range(padded // each):
                offset = y * dilation[0] * line + x * dilation[1] * pixel + group * each * size
                last = stretches[-1] if stretches else None
                if last and not last[2] and last[0] + last[1] * each * size == offset:
                    last[1] += 1
                else:
                    stretches.append([offset, 1, 0])
                at += 1
                stretches[-1][2] = int(at in cuts)
    return torch.tensor(shape), torch.tensor(stretches)


NATIVE = NativeLoops()
