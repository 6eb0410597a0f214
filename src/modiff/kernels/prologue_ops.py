"""The fused input side as three operators that torch can trace; the arithmetic is the core's, bit for bit.

    modiff::code_dynamic    scales measured on this residual
    modiff::code_static     scales given
    modiff::code_plain      no state at all: plain quantization

The first two change the input state in place. All run the compiled library where there is one and the layout allows,
else torch's own operators. Outside of a traced graph the functions behind them, `..._now`, save torch's dispatcher.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modiff.config import Granularity
from modiff.core.affine import QParams, choose_qparams, dequantize, qrange, quantize
from modiff.errors import KernelError
from modiff.kernels import native
from modiff.kernels.rows import row_shape, scale_shape
from modiff.kernels.triton import backend as gpu

_KINDS = {torch.float32: 0, torch.bfloat16: 1}


def code_eagerly(
    x: Tensor,
    state: Tensor,
    move: Tensor | None,
    gain: Tensor | None,
    scale: Tensor | None,
    bits: int,
    clip: float,
    granularity: Granularity,
    channel_dim: int,
) -> tuple[Tensor, Tensor]:
    """The same with the core's functions, one pass over memory for each operation: (codes, scale)."""
    exact = torch.float64 if state.dtype == torch.float64 else torch.float32
    held = state.to(exact)
    predicted = (
        held if move is None or gain is None else held + gain * move.to(exact)
    )  # p_t = â_{t+1} [+ g (â_{t+1} - â_{t+2})]
    residual = x.to(exact) - predicted
    if scale is None:
        qparams = choose_qparams(residual, bits, granularity, clip=clip, channel_dim=channel_dim)
    else:
        qparams = QParams(scale.to(exact), None)
    codes = quantize(residual, qparams, bits)
    value = predicted + dequantize(codes, qparams)  # â_t = p_t + q_t
    if move is not None:
        move.copy_(value - held)
    state.copy_(value)
    return (codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8), qparams.scale


def code_dynamic_now(
    x: Tensor,
    state: Tensor,
    move: Tensor | None,
    gain: Tensor | None,
    bits: int,
    clip: float,
    granularity: str,
    channel_dim: int,
) -> tuple[Tensor, Tensor]:
    """(uint8 codes of the residual, their scales); state and move become those of this step."""
    known = known_granularity(granularity)
    codes = torch.empty_like(x, dtype=torch.uint8)
    exact = torch.float64 if state.dtype == torch.float64 else torch.float32
    scale = x.new_empty(scale_shape(x, known, channel_dim), dtype=exact)
    if not _natively(x, state, move, gain, codes, scale, bits, clip, known, channel_dim, dynamic=True):
        found, measured = code_eagerly(x, state, move, gain, None, bits, clip, known, channel_dim)
        codes.copy_(found)
        scale.copy_(measured)
    return codes, scale


code_dynamic = torch.library.custom_op("modiff::code_dynamic", code_dynamic_now, mutates_args=("state", "move"))


@code_dynamic.register_fake
def _(
    x: Tensor,
    state: Tensor,
    move: Tensor | None,
    gain: Tensor | None,
    bits: int,
    clip: float,
    granularity: str,
    channel_dim: int,
) -> tuple[Tensor, Tensor]:
    exact = torch.float64 if state.dtype == torch.float64 else torch.float32
    shape = scale_shape(x, known_granularity(granularity), channel_dim)
    return torch.empty_like(x, dtype=torch.uint8), x.new_empty(shape, dtype=exact)


def code_static_now(
    x: Tensor,
    state: Tensor,
    move: Tensor | None,
    gain: Tensor | None,
    scale: Tensor,
    bits: int,
    granularity: str,
    channel_dim: int,
) -> Tensor:
    """uint8 codes of the residual with the given scales; state and move become those of this step."""
    known: Granularity = "tensor" if scale.numel() == 1 else known_granularity(granularity)
    codes = torch.empty_like(x, dtype=torch.uint8)
    if not _natively(x, state, move, gain, codes, scale, bits, 1.0, known, channel_dim, dynamic=False):
        codes.copy_(code_eagerly(x, state, move, gain, scale, bits, 1.0, known, channel_dim)[0])
    return codes


code_static = torch.library.custom_op("modiff::code_static", code_static_now, mutates_args=("state", "move"))


@code_static.register_fake
def _(
    x: Tensor,
    state: Tensor,
    move: Tensor | None,
    gain: Tensor | None,
    scale: Tensor,
    bits: int,
    granularity: str,
    channel_dim: int,
) -> Tensor:
    return torch.empty_like(x, dtype=torch.uint8)


def plain_eagerly(
    x: Tensor, scale: Tensor | None, bits: int, clip: float, granularity: Granularity, channel_dim: int
) -> tuple[Tensor, Tensor]:
    """Plain quantization with the core's functions: (codes, scale)."""
    value = x if x.dtype == torch.float64 else x.to(torch.float32)
    if scale is None:
        qparams = choose_qparams(value, bits, granularity, clip=clip, channel_dim=channel_dim)
    else:
        qparams = QParams(scale.to(value.dtype), None)
    codes = quantize(value, qparams, bits)
    return (codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8), qparams.scale


def code_plain_now(
    x: Tensor, scale: Tensor | None, bits: int, clip: float, granularity: str, channel_dim: int
) -> tuple[Tensor, Tensor]:
    """(uint8 codes of x itself, the scales used)."""
    known: Granularity = "tensor" if scale is not None and scale.numel() == 1 else known_granularity(granularity)
    codes = torch.empty_like(x, dtype=torch.uint8)
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    shape = scale_shape(x, known, channel_dim) if scale is None else scale.shape
    used = x.new_empty(shape, dtype=exact)
    if scale is not None:
        used.copy_(scale)
    if not _natively(x, None, None, None, codes, used, bits, clip, known, channel_dim, dynamic=scale is None):
        found, measured = plain_eagerly(x, scale, bits, clip, known, channel_dim)
        codes.copy_(found)
        used.copy_(measured)
    return codes, used


code_plain = torch.library.custom_op("modiff::code_plain", code_plain_now, mutates_args=())


@code_plain.register_fake
def _(
    x: Tensor, scale: Tensor | None, bits: int, clip: float, granularity: str, channel_dim: int
) -> tuple[Tensor, Tensor]:
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    shape = scale_shape(x, known_granularity(granularity), channel_dim) if scale is None else scale.shape
    return torch.empty_like(x, dtype=torch.uint8), x.new_empty(shape, dtype=exact)


def known_granularity(granularity: str) -> Granularity:
    """The name as one of those that have integer sums. Raises: KernelError for any other."""
    if granularity == "tensor" or granularity == "sample" or granularity == "token":
        return granularity
    raise KernelError(
        f"prologue: expected granularity 'tensor', 'sample' or 'token', got {granularity!r}. A scale along the summed "
        "axis has no integer sums. Choose one of the three."
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
    if library is None or x.dtype not in _KINDS or x.device.type != "cpu":
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
    library.modiff_prologue(
        x.data_ptr(), _KINDS[x.dtype], _pointer(state), _pointer(move), _pointer(gain), codes.data_ptr(),
        scale.data_ptr(), _pointer(partial), count, elements, int(dynamic), clip / highest, lowest, highest,
        torch.get_num_threads(),
    )  # fmt: skip
    return True


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
