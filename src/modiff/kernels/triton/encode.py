"""The input side in Triton: residual, scale, codes and state in one pass where a row fits into a block, else in two.

    r = x - â,   s = clip max|r| / qmax,   q = clamp(round(r / s)),   â += q s

Codes and float32 states equal the core's bit for bit: divisions are rounded as IEEE says, ties go to even, and no
product is fused into a sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SMALLEST_SCALE = tl.constexpr(1e-12)
_WHOLE = 8192
"""Rows up to this length are coded in one pass."""
_BLOCK = 4096


@triton.jit
def _rounded(x, LOWEST: tl.constexpr, HIGHEST: tl.constexpr):
    """clamp(round(x)), ties to even; NaN gives 0."""
    x = tl.where(x == x, tl.minimum(tl.maximum(x, LOWEST), HIGHEST), 0.0)
    return (x + 12582912.0) - 12582912.0  # 1.5 * 2^23: adding it leaves no room for a fraction


@triton.jit
def _code(x, state, codes, scale, at, mask, KEEPS: tl.constexpr, LOWEST: tl.constexpr, HIGHEST: tl.constexpr):
    """Codes of the elements `at`, and the next state in place."""
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    old = tl.load(state + at, mask=mask, other=0.0).to(tl.float32) if KEEPS else value * 0.0
    residual = value - old if KEEPS else value
    q = _rounded(tl.div_rn(residual, scale), LOWEST, HIGHEST)
    tl.store(codes + at, (q - LOWEST).to(tl.uint8), mask=mask)
    if KEEPS:
        tl.store(state + at, (old + q * scale).to(state.dtype.element_ty), mask=mask)


@triton.jit
def _scale_of(largest, factor):
    """max(factor * largest, 1e-12); NaN stays."""
    scale = largest * factor
    return tl.where(scale < SMALLEST_SCALE, SMALLEST_SCALE, scale)


@triton.jit
def _magnitude(x, state, at, mask, KEEPS: tl.constexpr):
    """|x - state| as the bits of a float: ordered like the floats, with NaN above everything."""
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if KEEPS:
        value -= tl.load(state + at, mask=mask, other=0.0).to(tl.float32)
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _whole_rows(
    x, state, codes, scales, count, factor,
    KEEPS: tl.constexpr, DYNAMIC: tl.constexpr, EACH: tl.constexpr, LOWEST: tl.constexpr, HIGHEST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row, from first to last element. EACH: given scales are one a row, else one for all."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    at, mask = row * count + k, k < count
    if DYNAMIC:
        bits = tl.max(_magnitude(x, state, at, mask, KEEPS), 0)
        scale = _scale_of(bits.to(tl.float32, bitcast=True), factor)
        tl.store(scales + row, scale)
    else:
        scale = tl.load(scales + row * EACH)
    _code(x, state, codes, scale, at, mask, KEEPS, LOWEST, HIGHEST)


@triton.jit
def _largest(x, state, maxima, count, KEEPS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest magnitude of a row, block by block; integers, so that the order of blocks does not matter."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_max(maxima + row, tl.max(_magnitude(x, state, row * count + k, k < count, KEEPS), 0))


@triton.jit
def _blocks(
    x, state, codes, scales, maxima, count, factor,
    KEEPS: tl.constexpr, DYNAMIC: tl.constexpr, EACH: tl.constexpr, LOWEST: tl.constexpr, HIGHEST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of a row whose largest magnitude is known."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if DYNAMIC:
        scale = _scale_of(tl.load(maxima + row).to(tl.float32, bitcast=True), factor)
        if tl.program_id(1) == 0:
            tl.store(scales + row, scale)
    else:
        scale = tl.load(scales + row * EACH)
    _code(x, state, codes, scale, row * count + k, k < count, KEEPS, LOWEST, HIGHEST)


def code_rows(
    x: Tensor, state: Tensor | None, codes: Tensor, scales: Tensor, bits: int, clip: float, *, dynamic: bool
) -> None:
    """Write codes, scales (where dynamic) and the next state of rows that share a scale.

    Args:
        x, state, codes: (rows, elements), dense; any float, float32 or float16, uint8. state None: plain quantization.
        scales: float32, one a row; where not dynamic, one may serve all.
    """
    rows, count = x.shape
    highest = 2 ** (bits - 1) - 1
    words = {"KEEPS": state is not None, "DYNAMIC": dynamic, "EACH": int(scales.numel() > 1), "LOWEST": -highest - 1,
             "HIGHEST": highest, "enable_fp_fusion": False}  # fmt: skip
    states, factor = x if state is None else state, clip / highest
    if count <= _WHOLE:
        block = triton.next_power_of_2(count)
        _whole_rows[(rows,)](x, states, codes, scales, count, factor, BLOCK=block, num_warps=4 if block <= 2048 else 8,
                             **words)  # fmt: skip
        return
    grid = (rows, triton.cdiv(count, _BLOCK))
    maxima = torch.zeros(rows, dtype=torch.int32, device=x.device)
    if dynamic:
        _largest[grid](x, states, maxima, count, KEEPS=state is not None, BLOCK=_BLOCK)
    _blocks[grid](x, states, codes, scales, maxima, count, factor, BLOCK=_BLOCK, **words)
