"""The input side behind a norm and an activation, as one operator that torch can trace.

modiff::code_after    y = activation(norm(x)), then codes of y against the state, which changes in place
"""

from __future__ import annotations

import ctypes
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from modiff.config import Granularity
from modiff.core.affine import qrange
from modiff.errors import KernelError
from modiff.kernels import native, prologue_ops
from modiff.kernels.fixed_point import FixedState, fixed_eagerly
from modiff.kernels.geometry import empty_output
from modiff.kernels.rows import pixel_pitch, row_shape, scale_shape

Norm = Literal["none", "group", "group_last", "layer", "affine", "gated"]
Activation = Literal["none", "silu", "gelu_tanh", "gelu"]

_NORMS: tuple[Norm, ...] = ("none", "group", "layer", "affine", "gated")  # "group_last" is turned into "group" before
_ACTIVATIONS: tuple[Activation, ...] = ("none", "silu", "gelu_tanh", "gelu")
_KINDS = {torch.float32: 0, torch.bfloat16: 1}


def code_after_now(
    x: Tensor,
    state: Tensor | None,
    move: Tensor | None,
    gain: Tensor | None,
    grid: Tensor | None,
    clipped: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    groups: int,
    eps: float,
    activation: str,
    bits: int,
    clip: float,
    granularity: str,
    channel_dim: int,
) -> tuple[Tensor, Tensor]:
    """(uint8 codes, the scales used).

    Args:
        state: becomes the next one in place; None for plain codes of y itself.
        move, gain: of the "linear" predictor; move becomes that of this step.
        grid, clipped: where the state is int16: its unit, and how many codes were cut, which is added to.
        weight, bias: of the norm, (C,); for "layer" also (B, C): the modulation of a sample, 1 + scale and shift. For
            "gated" the weight is the gate, shaped as x.
    """
    if norm not in _NORMS or activation not in _ACTIVATIONS:
        raise KernelError(
            f"code_after: expected norm {', '.join(_NORMS)} and activation {', '.join(_ACTIVATIONS)}, got "
            f"{norm!r} and {activation!r}. Nothing else is fused. Compute it before and use prologue."
        )
    known = prologue_ops.known_granularity(granularity)
    if scale is not None and scale.numel() == 1:
        known = "tensor"
    codes = _new_codes(x, norm)
    used = x.new_empty(scale_shape(x, known, channel_dim), dtype=torch.float32)
    if scale is not None:
        used.copy_(scale.reshape(used.shape))
    memory = _Memory(state, move, gain, grid, clipped)
    run = _plan(x, memory, codes, weight, norm, groups, known, channel_dim)
    if run is not None:
        _natively(run, x, memory, codes, used, scale is None, weight, bias, norm, groups, eps, activation, bits, clip)
        return codes, used.view(scale.shape) if scale is not None else used
    value = before(x, weight, bias, norm, groups, eps, activation)
    given = None if scale is None else used
    if state is None:
        found, measured = prologue_ops.plain_eagerly(value, given, bits, clip, known, channel_dim)
    elif grid is not None and clipped is not None:
        found, measured = fixed_eagerly(value, FixedState(state, grid), bits, clip, known, channel_dim, clipped)
    else:
        found, measured = prologue_ops.code_eagerly(value, state, move, gain, given, bits, clip, known, channel_dim)
    codes.copy_(found)
    used.copy_(measured)
    return codes, used.view(scale.shape) if scale is not None else used


code_after = torch.library.custom_op("modiff::code_after", code_after_now, mutates_args=("state", "move", "clipped"))


@code_after.register_fake
def _(
    x: Tensor,
    state: Tensor | None,
    move: Tensor | None,
    gain: Tensor | None,
    grid: Tensor | None,
    clipped: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    groups: int,
    eps: float,
    activation: str,
    bits: int,
    clip: float,
    granularity: str,
    channel_dim: int,
) -> tuple[Tensor, Tensor]:
    shape = scale_shape(x, prologue_ops.known_granularity(granularity), channel_dim) if scale is None else scale.shape
    return _new_codes(x, norm), x.new_empty(shape, dtype=torch.float32)


def _new_codes(x: Tensor, norm: str) -> Tensor:
    """In the layout of x; those of a part of the channels lie side by side."""
    if norm == "affine":
        return empty_output(x, x.shape, x.dim() - 2, torch.uint8)
    return torch.empty_like(x, dtype=torch.uint8)


def before(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: str, groups: int, eps: float, activation: str
) -> Tensor:
    """activation(norm(x)) with torch's operators, in float32 at least."""
    value = x if x.dtype == torch.float64 else x.float()
    if norm == "group":
        value = functional.group_norm(value, groups, _as(weight, value), _as(bias, value), eps)
    elif norm == "layer":
        value = functional.layer_norm(value, value.shape[-1:], None, None, eps)
        value = value if weight is None else value * _per_sample(weight, value)
        value = value if bias is None else value + _per_sample(bias, value)
    elif norm == "affine" and weight is not None and bias is not None:
        ones = [1] * (value.dim() - 2)
        value = value * _as(weight, value).reshape(*weight.shape, *ones) + _as(bias, value).reshape(*bias.shape, *ones)
    elif norm == "gated" and weight is not None:
        return value * _active(weight.to(value.dtype), activation)
    return _active(value, activation)


def _active(value: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return functional.silu(value)
    if activation == "none":
        return value
    return functional.gelu(value, approximate="tanh" if activation == "gelu_tanh" else "none")


def _as(x: Tensor | None, like: Tensor) -> Tensor | None:
    return None if x is None else x.to(like.dtype)


def _per_sample(x: Tensor, like: Tensor) -> Tensor:
    """(C,) or (B, C) -> broadcastable to (B, ..., C)."""
    x = x.to(like.dtype)
    return x if x.dim() == 1 else x.reshape(x.shape[0], *[1] * (like.dim() - 2), x.shape[1])


class _Memory(NamedTuple):
    """What a step knows of the last one, as `code_after_now` is given it."""

    state: Tensor | None
    move: Tensor | None
    gain: Tensor | None
    grid: Tensor | None
    clipped: Tensor | None

    def fits(self, codes: Tensor) -> bool:
        """Whether the compiled loops know its types, and meet it in memory as they meet the codes."""
        dtype = torch.float32 if self.grid is None else torch.int16
        laid = [x for x in (self.state, self.move) if x is not None]
        return all(x.dtype == dtype and x.stride() == codes.stride() for x in laid)

    def pointers(self) -> list[int | None]:
        """As norm.cpp reads it; the gain must be one float."""
        return [None if x is None else x.data_ptr() for x in self]


class _Plan(NamedTuple):
    """How the compiled loops walk: `segments` runs of `length`; mode as norm.cpp numbers it."""

    library: ctypes.CDLL
    mode: int
    segments: int
    length: int
    per_sample: int
    per_scale: int
    pitch: int


def _plan(
    x: Tensor,
    memory: _Memory,
    codes: Tensor,
    weight: Tensor | None,
    norm: str,
    groups: int,
    granularity: Granularity,
    channel_dim: int,
) -> _Plan | None:
    """None where the compiled loops do not know types or layout."""
    if x.device.type != "cpu" or x.dtype not in _KINDS or x.numel() == 0:
        return None
    if not memory.fits(codes) or not _as_walked(x, codes, norm):
        return None
    if norm == "gated" and not _gates(weight, x):
        return None
    rows = row_shape(codes, granularity, channel_dim)
    if rows is None or (library := native.load("norm").library) is None:
        return None
    if norm == "affine":
        pitch, pixels = pixel_pitch(x), x.numel() // x.shape[1]
        if pitch is None:
            return None
        return _Plan(library, 1, pixels, x.shape[1], pixels // x.shape[0], pixels // rows[0], pitch)
    if norm == "gated":
        tokens, pitch = x.numel() // x.shape[-1], pixel_pitch(x.movedim(-1, 1))
        if pitch is None or channel_dim % x.dim() != x.dim() - 1:
            return None
        return _Plan(library, 4, tokens, x.shape[-1], tokens, tokens // rows[0], pitch)
    innermost = not x.is_contiguous() or channel_dim % x.dim() == x.dim() - 1 or x.numel() == x.shape[0] * x.shape[1]
    if (norm == "layer" and channel_dim % x.dim() != x.dim() - 1) or (norm == "group" and channel_dim % x.dim() != 1):
        return None  # the norm has its channels elsewhere
    planes = x.numel() // (x.shape[0] * x.shape[1]) if x.dim() > 1 else x.numel()
    length = x.shape[channel_dim] if innermost else planes
    segments = x.numel() // length
    samples = x.shape[0] if norm == "group" or (weight is not None and weight.dim() == 2) else 1
    mode = {"none": 0, "group": 1 if innermost else 2, "layer": 3}[norm]
    return _Plan(library, mode, segments, length, segments // samples, segments // rows[0], length)


def _as_walked(x: Tensor, codes: Tensor, norm: str) -> bool:
    """Whether the loops, which go through memory from the first element on, meet x as it is meant.

    "affine" and "gated" have a pitch, as parts of the channels are read. Anything else must be dense, as the codes are:
    a slice, an expanded tensor or a half of a chunk is not.
    """
    if norm in ("affine", "gated"):
        return True
    if x.stride() != codes.stride():
        return False
    if norm == "layer":
        return x.is_contiguous()
    return norm == "none" or x.is_contiguous() or pixel_pitch(x) == x.shape[1]


def _gates(gate: Tensor | None, x: Tensor) -> bool:
    """Whether the loops can read the gate as they read x."""
    return gate is not None and (gate.dtype, gate.shape, gate.stride()) == (x.dtype, x.shape, x.stride())


def _natively(
    plan: _Plan,
    x: Tensor,
    memory: _Memory,
    codes: Tensor,
    scale: Tensor,
    dynamic: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    groups: int,
    eps: float,
    activation: str,
    bits: int,
    clip: float,
) -> None:
    memory = memory._replace(gain=None if memory.gain is None else memory.gain.to(torch.float32).contiguous())
    gate = weight.data_ptr() if norm == "gated" and weight is not None else None
    a, b, mean, rstd = _coefficients(plan, x, weight, bias, norm, groups, eps)
    lowest, highest = qrange(bits)
    plan.library.modiff_prologue_after(
        x.data_ptr(), _KINDS[x.dtype], plan.mode, _ACTIVATIONS.index(activation), a.data_ptr(), b.data_ptr(),
        mean.data_ptr(), rstd.data_ptr(), gate, *memory.pointers(), codes.data_ptr(), scale.data_ptr(),
        plan.segments, plan.length, plan.per_sample, plan.per_scale, plan.pitch, plan.length,
        int(dynamic), clip / highest, lowest, highest, torch.get_num_threads(),
    )  # fmt: skip


def _coefficients(
    plan: _Plan, x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: str, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(a, b, mean, rstd) as norm.cpp reads them; empty where the mode has no use for them."""
    nothing = torch.empty(0)
    if plan.mode in (0, 4):
        return nothing, nothing, nothing, nothing
    if norm == "affine" and weight is not None and bias is not None:
        return weight.float().contiguous(), bias.float().contiguous(), nothing, nothing
    threads, kind = torch.get_num_threads(), _KINDS[x.dtype]
    channels = plan.length if plan.mode != 2 else x.shape[1]
    w = _ones(channels) if weight is None else weight.float().contiguous()
    b = torch.zeros_like(w) if bias is None else bias.float().expand_as(w).contiguous()
    runs = plan.segments if plan.mode == 3 else x.shape[0] * groups
    mean, rstd = _floats(runs), _floats(runs)
    if plan.mode == 1:
        _grouped_moments(plan.library, x, groups, eps, mean, rstd)
    else:
        plan.library.modiff_moments(
            x.data_ptr(), kind, runs, x.numel() // runs, eps, mean.data_ptr(), rstd.data_ptr(), threads
        )
    if plan.mode == 3:
        return w, b, mean, rstd
    return *_joined(w, b, mean.view(-1, groups), rstd.view(-1, groups)), nothing, nothing


def _grouped_moments(library: ctypes.CDLL, x: Tensor, groups: int, eps: float, mean: Tensor, rstd: Tensor) -> None:
    """mean and rstd, (N, groups), of x with channels innermost in memory."""
    threads, samples, channels = torch.get_num_threads(), x.shape[0], x.shape[1]
    pixels = x.numel() // (samples * channels)
    pieces = 1 if samples >= threads else min(threads, pixels)
    sums = torch.empty(2 * samples * pieces * channels, dtype=torch.float64, device="cpu")
    library.modiff_grouped_moments(
        x.data_ptr(), _KINDS[x.dtype], samples, pixels, channels, groups, eps, sums.data_ptr(), pieces,
        mean.data_ptr(), rstd.data_ptr(), threads,
    )  # fmt: skip


def _joined(w: Tensor, b: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """(x - mean) rstd w + b = A x + B: A and B, (N, C)."""
    each = (*mean.shape, w.numel() // mean.shape[1])
    a = rstd.unsqueeze(2) * w.view(1, *each[1:])
    return a.flatten(1), (b.view(1, *each[1:]) - mean.unsqueeze(2) * a).flatten(1)


def _floats(*shape: int) -> Tensor:
    """Room for the C++ loops; what torch takes by default may be another type and another device."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _ones(count: int) -> Tensor:
    return torch.ones(count, dtype=torch.float32, device="cpu")


def group_norm_as_affine(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor] | None:
    """GroupNorm of x as A x + B, (N, C) each; None where the compiled loops do not know type or layout of x."""
    library = native.load("norm").library
    if library is None or x.device.type != "cpu" or x.dtype not in _KINDS or x.numel() == 0 or pixel_pitch(x) is None:
        return None
    if pixel_pitch(x) != x.shape[1]:
        return None
    mean, rstd = _floats(2, x.shape[0], groups)
    _grouped_moments(library, x, groups, eps, mean, rstd)
    w = _ones(x.shape[1]) if weight is None else weight.float().contiguous()
    return _joined(w, torch.zeros_like(w) if bias is None else bias.float().contiguous(), mean, rstd)
