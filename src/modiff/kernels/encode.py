"""Quantize the residual of a layer's input into codes, and write the next input state, in one or two passes.

    p_t = â_{t+1} [+ g (â_{t+1} - â_{t+2})],   s = clip * max|a_t - p_t| / qmax,   â_t = p_t + s code(a_t - p_t)

Compiled C++ on CPUs, Triton on GPUs, otherwise the core's own functions: equal codes and states, bit for bit. Unlike
the core, all of them write the state in place.

NaN and infinity, as in the core: a NaN, or an infinity under a dynamic scale, makes the scale of its tensor (sample,
token) NaN or infinite, and with it the state and every output: it is seen. Under a static scale a NaN codes to 0 and
leaves the state as it is, and an infinity saturates. Denormal residuals code to 0, as no scale is below 1e-12.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from modiff.core.affine import QParams, choose_qparams, dequantize, qrange, quantize_tensor
from modiff.errors import KernelError
from modiff.kernels import native
from modiff.kernels.dispatch import Choice
from modiff.kernels.layout import row_shape, scale_shape
from modiff.kernels.native import KINDS
from modiff.kernels.triton import backend as gpu

Memory = tuple[Tensor | None, Tensor | None, Tensor | None]
"""(state, move, gain) of an input; none of them for codes of the input itself."""
Settings = tuple[int, float, str, int]
"""(bits, clip, granularity, axis of the channels)."""


def choose_encoder(device: str = "cpu") -> Choice:
    """What encodes on a device ("native", "triton" or "eager"), and one line that says why."""
    if device == "cuda" and gpu.installed():
        return Choice("triton", "Triton, one pass over rows that fit into a block, otherwise two")
    if device != "cpu":
        return Choice("eager", f"the compiled loop runs on CPUs, the input is on {device}")
    library, reason = native.load_library("encode")
    if library is None:
        return Choice("eager", f"torch's own operators, several passes over memory: {reason}")
    return Choice("native", reason)


def encode_residual(
    x: Tensor,
    state: Tensor,
    scale: Tensor | None,
    bits: int,
    clip: float = 1.0,
    granularity: str = "tensor",
    *,
    channel_dim: int = -1,
    move: Tensor | None = None,
    gain: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantize what x differs from its prediction by, and write the next state (and move) in place.

    Args:
        x: a_t, any float dtype; on the compiled path float32 and bfloat16.
        state: â_{t+1}, the shape of x; float32 on the compiled path. It becomes â_t.
        scale: given scales, one or as many as the granularity has; None measures them.
        move, gain: of the "linear" predictor; move becomes â_t - â_{t+1}.
    Returns: uint8 codes in the layout of x, where 2^(bits - 1) stands for zero, and the scales, float32.
    Raises: KernelError for a granularity that no integer sum has, or shapes that do not fit.
    """
    if state.shape != x.shape or (move is None) != (gain is None) or (move is not None and move.shape != x.shape):
        shapes = [tuple(tensor.shape) for tensor in (state, move) if tensor is not None]
        raise KernelError(
            f"encode_residual: expected state and move of shape {tuple(x.shape)}, and move and gain both or neither, "
            f"got {' and '.join(map(str, shapes))}. They belong to another input. Start the trajectory again."
        )
    return _encode(x.detach(), (state, move, gain), scale, (bits, clip, granularity, channel_dim))


def encode_input(
    x: Tensor,
    scale: Tensor | None,
    bits: int,
    clip: float = 1.0,
    granularity: str = "tensor",
    *,
    channel_dim: int = -1,
) -> tuple[Tensor, Tensor]:
    """Codes of x itself, for layers without memory: (uint8 codes, scales), arguments as `encode_residual` has them."""
    return _encode(x.detach(), (None, None, None), scale, (bits, clip, granularity, channel_dim))


class EncodeLayout(NamedTuple):
    """What encoding an input of one shape and memory layout needs to know, once for all its steps.

    scales: their shape. rows: (how many, elements in each) that share a scale and lie side by side; None: not so.
    blocks: how many partial maxima the compiled loop needs. factor: clip / qmax.
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
    rows, (qmin, qmax) = row_shape(shape, strides, granularity, channel_dim), qrange(bits)
    blocks = 0 if rows is None or rows[1] <= native.BLOCK else rows[0] * -(-rows[1] // native.BLOCK)
    scales = scale_shape(shape, granularity, channel_dim)
    return EncodeLayout(bits, clip, granularity, channel_dim, scales, rows, blocks, qmin, qmax, clip / qmax)


def encode_eagerly(x: Tensor, memory: Memory, scale: Tensor | None, layout: EncodeLayout) -> tuple[Tensor, Tensor]:
    """`encode_residual` with the core's functions, one pass over memory for each operation: (codes, scale)."""
    state, move, gain = memory
    exact = torch.float64 if (x if state is None else state).dtype == torch.float64 else torch.float32
    residual = x = x.to(exact)
    predicted = old = x if state is None else state.to(exact)
    if state is not None:
        if move is not None and gain is not None:
            predicted = old + gain * move.to(exact)  # p_t = â_{t+1} [+ g (â_{t+1} - â_{t+2})]
        residual = x - predicted
    bits, clip, granularity, channel_dim, *_ = layout
    if scale is None:
        qparams = choose_qparams(residual, bits, granularity, clip=clip, channel_dim=channel_dim)
    else:
        qparams = QParams(scale.to(exact), None)
    codes = quantize_tensor(residual, qparams, bits)
    if state is not None:
        value = predicted + dequantize(codes, qparams)  # â_t = p_t + q_t
        if move is not None:
            move.copy_(value - old)
        state.copy_(value)
    return (codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8), qparams.scale


def _encode(x: Tensor, memory: Memory, scale: Tensor | None, settings: Settings) -> tuple[Tensor, Tensor]:
    state, move, _ = memory
    if scale is not None and scale.numel() == 1:
        settings = (settings[0], settings[1], "tensor", settings[3])
    strides = x.stride()
    layout = layout_of(x.shape, strides, *settings)
    codes = torch.empty_like(x, dtype=torch.uint8)
    used = scale
    if used is None:
        wide = (x if state is None else state).dtype == torch.float64
        used = x.new_empty(layout.scales, dtype=torch.float64 if wide else torch.float32)
    alike = codes.stride() == strides and (state is None or state.stride() == strides)
    if alike and layout.rows is not None and layout.rows[0] == used.numel() and used.dtype == torch.float32:
        if x.is_cuda or gpu.INTERPRETED:
            done = move is None and _on_gpu(layout, x, state, codes, used, dynamic=scale is None)
        else:
            done = _natively(layout, x, memory, codes, used, dynamic=scale is None)
        if done:
            return codes, used
    value, measured = encode_eagerly(x, memory, scale, layout)
    return codes.copy_(value), measured if scale is None else scale


def _natively(layout: EncodeLayout, x: Tensor, memory: Memory, codes: Tensor, scale: Tensor, *, dynamic: bool) -> bool:
    """Run the compiled loop; False where it does not know the types, and nothing was touched."""
    state, move, gain = memory
    known = x.dtype in KINDS and x.is_cpu and scale.is_contiguous() and (state is None or state.dtype == torch.float32)
    if layout.rows is None or not known:
        return False
    if move is not None and (move.dtype != torch.float32 or move.stride() != x.stride()):
        return False
    if (library := native.load_library("encode").library or native.missing("encode")) is None:
        return False
    partial = torch.empty(layout.blocks, dtype=torch.int32, device="cpu") if dynamic and layout.blocks else None
    gain = None if gain is None else gain.to(torch.float32).contiguous()
    library.modiff_encode(
        x.data_ptr(), KINDS[x.dtype], None if state is None else state.data_ptr(),
        None if move is None else move.data_ptr(), None if gain is None else gain.data_ptr(), codes.data_ptr(),
        scale.data_ptr(), None if partial is None else partial.data_ptr(), *layout.rows, int(dynamic), layout.factor,
        layout.qmin, layout.qmax, torch.get_num_threads(),
    )  # fmt: skip
    return True


def _on_gpu(
    layout: EncodeLayout, x: Tensor, state: Tensor | None, codes: Tensor, scale: Tensor, *, dynamic: bool
) -> bool:
    """Run Triton's kernel; False where it does not know the types, and nothing was touched."""
    known = gpu.installed() and scale.is_contiguous() and (state is None or state.dtype in gpu.STATES)
    if layout.rows is None or not known:
        return False
    strides = (layout.rows[1], 1)
    states = None if state is None else state.as_strided(layout.rows, strides)
    rows, sent = x.as_strided(layout.rows, strides), codes.as_strided(layout.rows, strides)
    gpu.encode_rows(rows, states, sent, scale.view(-1), layout.bits, layout.clip, dynamic=dynamic)
    return True
