"""The input side of a modulated layer, fused: residual, scale, codes and the next input state.

    p_t = â_{t+1} [+ g (â_{t+1} - â_{t+2})],   s = clip * max|a_t - p_t| / qmax,   â_t = p_t + s code(a_t - p_t)

Three implementations with equal codes and states, bit for bit: "native" (compiled C++: one pass over memory, two with
dynamic scales), "inductor" (torch.compile) and "eager" (the core's own functions). Unlike the core, they write the
state in place.

NaN and infinity, as in the core: a NaN, or an infinity under a dynamic scale, makes the scale of its tensor (sample,
token) NaN or infinite, and with it the state and every output: it is seen. Under a static scale a NaN codes to 0 and
leaves the state as it is, and an infinity saturates. Denormal residuals code to 0, as no scale is below 1e-12.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from modiff.config import Granularity
from modiff.errors import KernelError
from modiff.kernels import native, prologue_ops
from modiff.kernels.rows import as_rows, scale_shape
from modiff.kernels.triton import backend as gpu

Implementation = Literal["auto", "native", "triton", "inductor", "eager"]


class PrologueChoice(NamedTuple):
    """An implementation, and one line for `explain`."""

    implementation: Implementation
    reason: str


def choose_prologue(device: str = "cpu", compiled: native.Native | None = None) -> PrologueChoice:
    """The fastest implementation for a device; `compiled` pretends a library, None asks for the real one."""
    if device == "cuda" and gpu.installed():
        return PrologueChoice("triton", "Triton, one pass over rows that fit into a block, else two")
    if device != "cpu":
        return PrologueChoice("eager", f"the compiled loop runs on CPUs, the input is on {device}")
    compiled = native.load() if compiled is None else compiled
    if compiled.library is None:
        return PrologueChoice("eager", f"torch's own operators, several passes over memory: {compiled.reason}")
    return PrologueChoice("native", compiled.reason)


def prologue(
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
    implementation: Implementation = "auto",
) -> tuple[Tensor, Tensor]:
    """Code x against its state, and write the next state (and move) in place.

    Args:
        x: a_t, any float dtype; on the compiled path float32 and bfloat16.
        state: â_{t+1}, the shape of x; float32 on the compiled path. It becomes â_t.
        scale: given scales, one or as many as the granularity has; None measures them.
        move, gain: of the "linear" predictor; move becomes â_t - â_{t+1}.
        implementation: "auto" is "native" where there is a compiler, "triton" on GPUs, else "eager".
    Returns: uint8 codes in the layout of x, where 2^(bits - 1) stands for zero, and the scales, float32.
    Raises: KernelError for a granularity that no integer sum has, or shapes that do not fit.
    """
    shapes = [tuple(part.shape) for part in (state, move) if part is not None]
    if any(shape != tuple(x.shape) for shape in shapes) or (move is None) != (gain is None):
        raise KernelError(
            f"prologue: expected state and move of shape {tuple(x.shape)}, and move and gain both or neither, got "
            f"{' and '.join(map(str, shapes))}. They belong to another input. Start the trajectory again."
        )
    x = x.detach()
    if implementation in ("auto", "native", "triton"):
        traced = torch.compiler.is_compiling()
        if scale is None:
            measure = prologue_ops.code_dynamic if traced else prologue_ops.code_dynamic_now
            return measure(x, state, move, gain, bits, clip, granularity, channel_dim)
        code = prologue_ops.code_static if traced else prologue_ops.code_static_now
        return code(x, state, move, gain, scale, bits, granularity, channel_dim), scale
    if implementation == "inductor":
        return _compiled(x, state, move, gain, scale, bits, clip, granularity, channel_dim)
    return prologue_ops.code_eagerly(x, state, move, gain, scale, bits, clip, granularity, channel_dim)


def plain(
    x: Tensor,
    scale: Tensor | None,
    bits: int,
    clip: float = 1.0,
    granularity: Granularity = "tensor",
    *,
    channel_dim: int = -1,
) -> tuple[Tensor, Tensor]:
    """Codes of x itself, for layers without memory: (uint8 codes, scales), arguments as `prologue` has them."""
    code = prologue_ops.code_plain if torch.compiler.is_compiling() else prologue_ops.code_plain_now
    return code(x.detach(), scale, bits, clip, granularity, channel_dim)


def _compiled(
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
    """As rows, so that one compilation serves every shape; tensors without rows run eagerly."""
    if scale is not None and scale.numel() == 1:
        granularity = "tensor"
    dense = [t for t in (x, state, move) if t is not None]
    rows = [as_rows(t, granularity, channel_dim) for t in dense]
    if any(r is None for r in rows) or any(t.stride() != x.stride() for t in dense):
        return prologue_ops.code_eagerly(x, state, move, gain, scale, bits, clip, granularity, channel_dim)
    settings = (bits, clip, granularity != "tensor", len(dense), scale is None, x.dtype, state.dtype)
    given = None if scale is None else scale.reshape(-1, 1)
    flat = [r.data for r in rows if r is not None]  # without their bases, whose shapes torch would compile for
    codes, found = _program(settings)(flat[0], flat[1], flat[2] if move is not None else None, gain, given, bits, clip)
    shape = scale_shape(x, granularity, channel_dim)
    return codes.as_strided(x.shape, x.stride()), found.view(shape) if scale is None else scale


def _on_rows(
    x: Tensor, state: Tensor, move: Tensor | None, gain: Tensor | None, scale: Tensor | None, bits: int, clip: float
) -> tuple[Tensor, Tensor]:
    return prologue_ops.code_eagerly(x, state, move, gain, scale, bits, clip, "token", -1)


@functools.cache
def _program(settings: tuple[object, ...]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A compiled function for each combination of settings, with code of its own.

    torch counts recompilations for each code object and falls back to eager, silently, after eight.
    """
    copy = types.FunctionType(
        _on_rows.__code__.replace(co_name=f"prologue_{abs(hash(settings))}"), _on_rows.__globals__
    )
    return torch.compile(copy, dynamic=True, fullgraph=True)
