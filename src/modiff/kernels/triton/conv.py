"""A convolution on integers as an implicit matmul, in Triton, channels innermost; PyTorch has none on CUDA.

    ô[n, o, y, x] += s[n] s_w[o] sum_{c, u, v} (code[n, c, Y, X] - zero) w[o, c, u, v]
    Y = y stride + u dilation - padding,  X likewise

Pixels outside of the image are zero, the byte `zero`. Kernel size 1 without stride or padding is `triton_linear`'s.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from modiff.kernels.layout import Geometry
from modiff.kernels.triton.linear import finish, options, tile_sizes


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
    finish(total, down, weight_scale, bias, state, output, m, n, rows, columns, KEEPS, WRITES, BIASED, RAW)


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
    blocks = tile_sizes(rows, columns, channels)
    grid = (triton.cdiv(rows, blocks[0]) * triton.cdiv(columns, blocks[1]),)
    _conv[grid](
        codes, weight, weight_scale, scale.reshape(-1), images=images, high=high, wide=wide, channels=channels,
        out_high=out_high, out_wide=out_wide, columns=columns, ZERO=zero, SCALES=int(scale.numel() > 1),
        KERNEL_Y=weight.shape[1], KERNEL_X=weight.shape[2], STRIDE_Y=geometry.stride[0], STRIDE_X=geometry.stride[1],
        PAD_Y=geometry.padding[0], PAD_X=geometry.padding[1], STEP_Y=geometry.dilation[0],
        STEP_X=geometry.dilation[1], **options(weight_scale, state, output, bias, blocks),
    )  # fmt: skip
