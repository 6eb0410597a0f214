"""Quantize the residual of a layer's input into codes, and write the next input state, in one or two passes.

    p_t = â_{t+1} [+ g (â_{t+1} - â_{t+2})],   s = clip * max|a_t - p_t| / qmax,   â_t = p_t + s code(a_t - p_t)

Compiled C++ on CPUs, Triton on GPUs, otherwise the core's own functions: equal codes and states, bit for bit. Unlike
the core, all of them write the state in place.

NaN and infinity, as in the core: a NaN, or an infinity under a dynamic scale, makes the scale of its tensor (sample,
token) NaN or infinite, and with it the state and every output: it is seen. Under a static scale a NaN codes to 0 and
leaves the state as it is, and an infinity saturates. Denormal residuals code to 0, as no scale is below 1e-12.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from modiff.config import Granularity
from modiff.core.affine import QParams, choose_qparams, dequantize, qrange, quantize
from modiff.errors import KernelError
from modiff.kernels import native
from modiff.kernels.layout import row_shape, scale_shape
from modiff.kernels.triton import backend as gpu

KINDS = {torch.float32: 0, torch.bfloat16: 1}
"""The types of inputs that the compiled loops read, as C++ numbers them."""


class EncoderChoice(NamedTuple):
    """What encodes on a device, and one line for `explain`."""

    implementation: Literal["native", "triton", "eager"]
    reason: str


def choose_encoder(device: str = "cpu", compiled: native.Native | None = None) -> EncoderChoice:
    """The fastest implementation for a device; `compiled` pretends a library, None asks for the real one."""
    if device == "cuda" and gpu.installed():
        return EncoderChoice("triton", "Triton, one pass over rows that fit into a block, else two")
    if device != "cpu":
        return EncoderChoice("eager", f"the compiled loop runs on CPUs, the input is on {device}")
    compiled = native.load() if compiled is None else compiled
    if compiled.library is None:
        return EncoderChoice("eager", f"torch's own operators, several passes over memory: {compiled.reason}")
    return EncoderChoice("native", compiled.reason)


def encode_residual(
    x: Tensor,
    state: Tensor,
    scale: Tensor | None,
    bits: int,
    clip: float = 1.0,
    granularity: Granularity = "tensor",
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
        shapes = [tuple(part.shape) for part in (state, move) if part is not None]
        raise KernelError(
            f"encode_residual: expected state and move of shape {tuple(x.shape)}, and move and gain both or neither, "
            f"got {' and '.join(map(str, shapes))}. They belong to another input. Start the trajectory again."
        )
    return _encode(x.detach(), state, move, gain, scale, bits, clip, granularity, channel_dim)


def encode_input(
    x: Tensor,
    scale: Tensor | None,
    bits: int,
    clip: float = 1.0,
    granularity: Granularity = "tensor",
    *,
    channel_dim: int = -1,
) -> tuple[Tensor, Tensor]:
    """Codes of x itself, for layers without memory: (uint8 codes, scales), arguments as `encode_residual` has them."""
    return _encode(x.detach(), None, None, None, scale, bits, clip, granularity, channel_dim)


def _encode(
    x: Tensor,
    state: Tensor | None,
    move: Tensor | None,
    gain: Tensor | None,
    scale: Tensor | None,
    bits: int,
    clip: float,
    granularity: Granularity,
    channel_dim: int,
) -> tuple[Tensor, Tensor]:
    if granularity not in _SUMMABLE:
        check_granularity(granularity)
    if scale is not None and scale.numel() == 1:
        granularity = "tensor"
    codes = torch.empty_like(x, dtype=torch.uint8)
    wide = torch.float64 in (x.dtype if state is None else state.dtype,)
    used = (
        x.new_empty(scale_shape(x, granularity, channel_dim), dtype=torch.float64 if wide else torch.float32)
        if scale is None
        else scale
    )
    if _natively(x, state, move, gain, codes, used, bits, clip, granularity, channel_dim, dynamic=scale is None):
        return codes, used
    value, measured = encode_eagerly(x, state, move, gain, scale, bits, clip, granularity, channel_dim)
    return codes.copy_(value), measured if scale is None else scale


def encode_eagerly(
    x: Tensor,
    state: Tensor | None,
    move: Tensor | None,
    gain: Tensor | None,
    scale: Tensor | None,
    bits: int,
    clip: float,
    granularity: Granularity,
    channel_dim: int,
) -> tuple[Tensor, Tensor]:
    """The same with the core's functions, one pass over memory for each operation: (codes, scale)."""
    exact = torch.float64 if (x if state is None else state).dtype == torch.float64 else torch.float32
    predicted = held = None if state is None else state.to(exact)
    if held is not None and move is not None and gain is not None:
        predicted = held + gain * move.to(exact)  # p_t = â_{t+1} [+ g (â_{t+1} - â_{t+2})]
    residual = x.to(exact) if predicted is None else x.to(exact) - predicted
    if scale is None:
        qparams = choose_qparams(residual, bits, granularity, clip=clip, channel_dim=channel_dim)
    else:
        qparams = QParams(scale.to(exact), None)
    codes = quantize(residual, qparams, bits)
    if state is not None and predicted is not None and held is not None:
        value = predicted + dequantize(codes, qparams)  # â_t = p_t + q_t
        if move is not None:
            move.copy_(value - held)
        state.copy_(value)
    return (codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8), qparams.scale


_SUMMABLE = ("tensor", "sample", "token")


def check_granularity(granularity: str) -> None:
    """Raises: KernelError for a granularity that has no integer sums."""
    if granularity not in _SUMMABLE:
        raise KernelError(
            f"encode: expected granularity 'tensor', 'sample' or 'token', got {granularity!r}. A scale along the "
            "summed axis has no integer sums. Choose one of the three."
        )


def _natively(
    x: Tensor,
    state: Tensor | None,
    move: Tensor | None,
    gain: Tensor | None,
    codes: Tensor,
    scale: Tensor,
    bits: int,
    clip: float,
    granularity: Granularity,
    channel_dim: int,
    *,
    dynamic: bool,
) -> bool:
    """Run the compiled loop; False where it does not know the layout or the types, and nothing was touched."""
    if move is None and gpu.code(x, state, codes, scale, bits, clip, granularity, channel_dim, dynamic=dynamic):
        return True
    library = native.load().library
    if library is None or x.dtype not in KINDS or x.device.type != "cpu":
        return False
    if any(t is not None and t.dtype != torch.float32 for t in (state, move, scale)) or not scale.is_contiguous():
        return False
    strides = x.stride()
    if any(t is not None and t.stride() != strides for t in (state, move, codes)):
        return False
    rows = row_shape(x, granularity, channel_dim)
    if rows is None or rows[0] != scale.numel():
        return False
    (count, elements), (lowest, highest), block = rows, qrange(bits), native.block(library)
    partial = (
        torch.empty(count * -(-elements // block), dtype=torch.int32, device="cpu")
        if dynamic and elements > block
        else None
    )
    gain = None if gain is None else gain.to(torch.float32).contiguous()
    library.modiff_encode(
        x.data_ptr(), KINDS[x.dtype], _pointer(state), _pointer(move), _pointer(gain), codes.data_ptr(),
        scale.data_ptr(), _pointer(partial), count, elements, int(dynamic), clip / highest, lowest, highest,
        torch.get_num_threads(),
    )  # fmt: skip
    return True


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
