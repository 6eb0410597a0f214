"""Products of integers in Triton: int8 summed in int32, added to the output state in the epilogue.

    ô[m, n] += s[m] s_w[n] sum_k (code[m, k] - zero) w[n, k],    y = ô in the dtype of the model

    ô[n, o, y, x] += s[n] s_w[o] sum_{c, u, v} (code[n, c, Y, X] - zero) w[o, c, u, v]
    Y = y stride + u dilation - padding,  X likewise

A convolution is an implicit matmul, channels innermost; PyTorch has none on CUDA. Pixels outside of the image are zero,
the byte `zero`. Kernel size 1 without stride or padding is a linear layer's.

The input side: residual, scale, codes and state in one pass where a row fits into a block, otherwise in two.

    r = x - â,   s = clip max|r| / qmax,   q = clamp(round(r / s)),   â += q s

Codes and float32 states equal the core's bit for bit: divisions are rounded as IEEE says, ties go to even, and no
product is fused into a sum. Triton is imported with this module: `backend` decides whether it may be.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from modiff.kernels.layout import Geometry


@triton.jit
def _linear(
    codes, weight, weight_scale, scale, bias, state, output, rows, columns, depth,
    ZERO: tl.constexpr, SCALES: tl.constexpr, KEEPS: tl.constexpr, WRITES: tl.constexpr, BIASED: tl.constexpr,
    RAW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One block of the output. codes (M, K) uint8, weight (N, K) int8, state and output (M, N), all dense.

    SCALES: how many rows share a scale, 0 for all. KEEPS: add to the state, not to zero or the bias.
    RAW: write the int32 sums alone.
    """
    pid = tl.program_id(0)
    blocks_m, blocks_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    first = pid // (GROUP * blocks_n) * GROUP  # blocks that share weights run next to each other
    size = min(blocks_m - first, GROUP)
    m = (first + pid % (GROUP * blocks_n) % size) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid % (GROUP * blocks_n) // size * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in range(0, depth, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(codes + m[:, None].to(tl.int64) * depth + k[None, :],
                    mask=(m[:, None] < rows) & (k[None, :] < depth), other=ZERO)  # fmt: skip
        b = tl.load(weight + n[None, :].to(tl.int64) * depth + k[:, None],
                    mask=(n[None, :] < columns) & (k[:, None] < depth), other=0)  # fmt: skip
        signed = (a.to(tl.int16) - ZERO).to(tl.int8)
        total = tl.dot(signed, b, total, out_dtype=tl.int32)
    if SCALES == 0:
        down = tl.load(scale) + tl.zeros((BLOCK_M,), dtype=tl.float32)
    else:
        down = tl.load(scale + m // SCALES, mask=m < rows, other=0.0)
    _finish(total, down, weight_scale, bias, state, output, m, n, rows, columns, KEEPS, WRITES, BIASED, RAW)


@triton.jit
def _conv(
    codes, weight, weight_scale, scale, bias, state, output, images, high, wide, channels, out_high, out_wide, columns,
    ZERO: tl.constexpr, SCALES: tl.constexpr, KEEPS: tl.constexpr, WRITES: tl.constexpr, BIASED: tl.constexpr,
    RAW: tl.constexpr, KERNEL_Y: tl.constexpr, KERNEL_X: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    PAD_Y: tl.constexpr, PAD_X: tl.constexpr, STEP_Y: tl.constexpr, STEP_X: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One block of output pixels and channels. codes (N, H, W, C), weight (O, KY, KX, C), state (N, H', W', O), dense.

    SCALES: 0 for one scale, 1 for one a sample.
    """
    rows = images * out_high * out_wide
    pid = tl.program_id(0)
    blocks_m, blocks_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    first = pid // (GROUP * blocks_n) * GROUP
    size = min(blocks_m - first, GROUP)
    m = (first + pid % (GROUP * blocks_n) % size) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid % (GROUP * blocks_n) // size * BLOCK_N + tl.arange(0, BLOCK_N)
    image, y, x = m // (out_high * out_wide), m // out_wide % out_high, m % out_wide
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for tap in range(KERNEL_Y * KERNEL_X):
        u, v = tap // KERNEL_X, tap % KERNEL_X
        row, column = y * STRIDE_Y + u * STEP_Y - PAD_Y, x * STRIDE_X + v * STEP_X - PAD_X
        seen = (m < rows) & (row >= 0) & (row < high) & (column >= 0) & (column < wide)
        pixel = ((image * high + row) * wide + column).to(tl.int64) * channels
        for start in range(0, channels, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            a = tl.load(codes + pixel[:, None] + k[None, :], mask=seen[:, None] & (k[None, :] < channels), other=ZERO)
            b = tl.load(weight + (n[None, :] * (KERNEL_Y * KERNEL_X) + tap).to(tl.int64) * channels + k[:, None],
                        mask=(n[None, :] < columns) & (k[:, None] < channels), other=0)  # fmt: skip
            signed = (a.to(tl.int16) - ZERO).to(tl.int8)
            total = tl.dot(signed, b, total, out_dtype=tl.int32)
    if SCALES == 0:
        down = tl.load(scale) + tl.zeros((BLOCK_M,), dtype=tl.float32)
    else:
        down = tl.load(scale + image, mask=m < rows, other=0.0)
    _finish(total, down, weight_scale, bias, state, output, m, n, rows, columns, KEEPS, WRITES, BIASED, RAW)


@triton.jit
def _finish(
    total, down, weight_scale, bias, state, output, m, n, rows, columns,
    KEEPS: tl.constexpr, WRITES: tl.constexpr, BIASED: tl.constexpr, RAW: tl.constexpr,
):  # fmt: skip
    inside = (m[:, None] < rows) & (n[None, :] < columns)
    at = m[:, None].to(tl.int64) * columns + n[None, :]
    if RAW:
        tl.store(output + at, total, mask=inside)
    else:
        across = tl.load(weight_scale + n, mask=n < columns, other=0.0)
        value = total.to(tl.float32) * across[None, :] * down[:, None]
        if BIASED:
            value += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
        if KEEPS:
            value += tl.load(state + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(state + at, value.to(state.dtype.element_ty), mask=inside)
        if WRITES:
            tl.store(output + at, value.to(output.dtype.element_ty), mask=inside)


def run_linear(
    codes: Tensor, weight: Tensor, weight_scale: Tensor, scale: Tensor, zero: int, *,
    state: Tensor | None = None, output: Tensor | None = None, bias: Tensor | None = None,
) -> None:  # fmt: skip
    """Add to `state` (M, N) in place, and write the new state into `output` as well; either may be missing.

    Args:
        codes: uint8 (M, K). weight: int8 (N, K). weight_scale: float32 (N,). scale: float32, one, or one for each run
            of M / len(scale) rows.
        state: float32, float16 or bfloat16, dense. output: any of these, or int32 for the sums alone.
        bias: (N,), added where there is no state.
    """
    rows, depth = codes.shape
    columns = weight.shape[0]
    block_m, block_n, block_k = _tile_sizes(rows, columns, depth)
    grid = (triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n),)
    _linear[grid](
        codes, weight, weight_scale, scale.reshape(-1), rows=rows, columns=columns, depth=depth, ZERO=zero,
        SCALES=0 if scale.numel() == 1 else rows // scale.numel(),
        **_options(weight_scale, state, output, bias, (block_m, block_n, block_k)),
    )  # fmt: skip


def run_conv(
    codes: Tensor, weight: Tensor, weight_scale: Tensor, scale: Tensor, zero: int, geometry: Geometry, *,
    state: Tensor | None = None, output: Tensor | None = None, bias: Tensor | None = None,
) -> None:  # fmt: skip
    """Add to `state` in place, and write the new state into `output` as well; either may be missing.

    Args:
        codes: uint8 (N, C, H, W), channels innermost in memory. weight: int8 (O, KY, KX, C), dense.
        weight_scale: float32 (O,). scale: float32, one, or one a sample.
        state, output: (N, O, H', W'), channels innermost in memory; an int32 output takes the sums alone.
        bias: (O,), added where there is no state.
    """
    images, columns, out_high, out_wide = torch.as_tensor(output if state is None else state).shape
    _, channels, high, wide = codes.shape
    rows = images * out_high * out_wide
    blocks = _tile_sizes(rows, columns, channels)
    grid = (triton.cdiv(rows, blocks[0]) * triton.cdiv(columns, blocks[1]),)
    _conv[grid](
        codes, weight, weight_scale, scale.reshape(-1), images=images, high=high, wide=wide, channels=channels,
        out_high=out_high, out_wide=out_wide, columns=columns, ZERO=zero, SCALES=int(scale.numel() > 1),
        KERNEL_Y=weight.shape[1], KERNEL_X=weight.shape[2], STRIDE_Y=geometry.stride[0], STRIDE_X=geometry.stride[1],
        PAD_Y=geometry.padding[0], PAD_X=geometry.padding[1], STEP_Y=geometry.dilation[0],
        STEP_X=geometry.dilation[1], **_options(weight_scale, state, output, bias, blocks),
    )  # fmt: skip


def _options(
    weight_scale: Tensor, state: Tensor | None, output: Tensor | None, bias: Tensor | None, blocks: tuple[int, int, int]
) -> dict[str, Any]:
    return {
        "bias": weight_scale if bias is None else bias, "state": output if state is None else state,
        "output": state if output is None else output,
        "KEEPS": state is not None, "WRITES": output is not None, "BIASED": bias is not None,
        "RAW": output is not None and output.dtype == torch.int32, "BLOCK_M": blocks[0], "BLOCK_N": blocks[1],
        "BLOCK_K": blocks[2], "GROUP": 8, "num_warps": 8 if blocks[0] >= 128 else 4, "num_stages": 3,
        "enable_fp_fusion": False,
    }  # fmt: skip


def _tile_sizes(rows: int, columns: int, depth: int) -> tuple[int, int, int]:
    """Sizes of the blocks: large where there is enough work to fill a GPU with them, at least what `tl.dot` takes."""
    most = (128, 256 if columns >= 2048 and rows >= 2048 else 128, 128)
    m, n, k = (
        max(16, min(triton.next_power_of_2(size), top)) for size, top in zip((rows, columns, depth), most, strict=True)
    )
    return m, n, k


SMALLEST_SCALE = tl.constexpr(1e-12)
_WHOLE = 8192
"""Rows up to this length are coded in one pass."""
_BLOCK = 4096


@triton.jit
def _rounded(x, LOWEST: tl.constexpr, HIGHEST: tl.constexpr):
    x = tl.where(x == x, tl.minimum(tl.maximum(x, LOWEST), HIGHEST), 0.0)
    return (x + 12582912.0) - 12582912.0  # 1.5 * 2^23: adding it leaves no room for a fraction


@triton.jit
def _code(x, state, codes, scale, at, mask, KEEPS: tl.constexpr, LOWEST: tl.constexpr, HIGHEST: tl.constexpr):
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    old = tl.load(state + at, mask=mask, other=0.0).to(tl.float32) if KEEPS else value * 0.0
    residual = value - old if KEEPS else value
    q = _rounded(tl.div_rn(residual, scale), LOWEST, HIGHEST)
    tl.store(codes + at, (q - LOWEST).to(tl.uint8), mask=mask)
    if KEEPS:
        tl.store(state + at, (old + q * scale).to(state.dtype.element_ty), mask=mask)


@triton.jit
def _scale_of(largest, factor):
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
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_max(maxima + row, tl.max(_magnitude(x, state, row * count + k, k < count, KEEPS), 0))


@triton.jit
def _blocks(
    x, state, codes, scales, maxima, count, factor,
    KEEPS: tl.constexpr, DYNAMIC: tl.constexpr, EACH: tl.constexpr, LOWEST: tl.constexpr, HIGHEST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
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
