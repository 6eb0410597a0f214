"""Quantize activation(norm(x)) without materializing it.

    y = activation(norm(x)),   then p_t, s, q_t and â_t of y as in `encode`

The compiled path computes statistics in one pass and y, once, in a buffer that stays in the cache while it is encoded.
Norms and exponentials are not torch's bit for bit: y differs by float error, so a code may differ by one where y lies
between two. The law holds all the same, as the state takes what was sent.
"""

import ctypes
import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from modiff.kernels import native
from modiff.kernels.encode import Encoded, FixedState, Past, encode_eagerly, past_of
from modiff.kernels.layout import EncodeLayout, empty_output, is_innermost, layout_of, pixel_pitch
from modiff.kernels.native import KINDS

Norm = Literal["none", "group", "group_last", "layer", "affine", "gated"]
Activation = Literal["none", "silu", "gelu_tanh", "gelu"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # in the order in which input_fusion.cpp numbers them
    "none": lambda y: y,
    "silu": functional.silu,
    "gelu_tanh": functools.partial(functional.gelu, approximate="tanh"),
    "gelu": functional.gelu,
}
_NUMBERS = {name: number for number, name in enumerate(_ACTIVATIONS)}


class InputFusion(NamedTuple):
    """What stands between a tensor x and the layer that reads it: y = activation(norm(x)).

    Args:
        norm: "group": x is (N, C, ...), in either memory layout; "group_last": the same of x (N, ..., C);
            "layer": x is (..., C), over its last axis;
            "affine": weight x + bias, (N, C) each, of some of the channels of (N, C, ...); "gated": no norm, but
            y = x activation(weight), with a gate shaped as x (..., C) for weight: GEGLU, SwiGLU.
        weight, bias: of the norm, (C,) or None; for "layer" also (B, C): the modulation of a sample, 1 + scale, shift.
        groups, eps: of the norm. activation: behind it.
    """

    norm: Norm = "none"
    groups: int = 1
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 0.0
    activation: Activation = "none"

    def split(self, x: Tensor, sizes: tuple[int, ...]) -> list[tuple[Tensor, "InputFusion"]] | None:
        """(some channels of x, their fusion) for each run of channels; None where no kernel reads such runs."""
        if len(sizes) == 1:
            return [(x, self)]
        x, known = x.detach(), x.device.type == "cpu" and x.dtype in KINDS and x.numel() > 0
        if self.norm != "group" or not known or pixel_pitch(x.shape, x.stride()) != x.shape[1]:
            return None
        if (library := native.load_library("input_fusion").library or native.missing("input_fusion")) is None:
            return None
        affine = _grouped_affine(library, self, x, (x.shape[0], x[0, 0].numel(), x.shape[1]), innermost=True)
        runs = zip(x.split(list(sizes), 1), *(c.split(list(sizes), 1) for c in affine), strict=True)
        return [(run, InputFusion("affine", 1, a, b, 0.0, self.activation)) for run, a, b in runs]

    def compute(self, x: Tensor) -> Tensor:
        """y by torch's operators, in float32 at least."""
        if self.norm == "group_last":
            return self._replace(norm="group").compute(x.movedim(-1, 1)).movedim(1, -1)
        return _normalized(self._detached(), x.detach())

    def encode(
        self, x: Tensor, state: Tensor | FixedState | None, scale: Tensor | None, bits: int, clip: float = 1.0,
        granularity: str = "tensor", *, channel_dim: int = -1, move: Tensor | None = None, gain: Tensor | None = None,
        clipped: Tensor | None = None,
    ) -> Encoded:  # fmt: skip
        """`encode_residual` of y, which is shaped as x."""
        past, weight = past_of(x, state, scale, move, gain, clipped), self.weight
        if scale is not None and scale.numel() == 1:
            granularity = "tensor"
        modulated = weight is not None and weight.dim() == 2
        plan = _plan(self.norm, modulated, x.shape, x.stride(), bits, clip, granularity, channel_dim)
        codes = torch.empty_strided(x.shape, plan.strides, dtype=torch.uint8, device=x.device)
        if scale is None:
            used = torch.empty(plan.layout.scales, dtype=torch.float32, device=x.device)
        else:
            used = scale.to(torch.float32).reshape(plan.layout.scales).contiguous()
        if (library := _library(self, x, past, plan)) is None:
            value, used, jumps = encode_eagerly(self.compute(x), past, None if scale is None else used, plan.layout)
            codes.copy_(value)
        else:
            kept, coefficients = _coefficients(library, plan, self, x)
            jumps = library.modiff_encode_fused(
                x.data_ptr(), KINDS[x.dtype], plan.mode, _NUMBERS[self.activation], *coefficients,
                *[None if t is None else t.data_ptr() for t in past], codes.data_ptr(), used.data_ptr(), *plan.walk,
                int(scale is None), *plan.limits, torch.get_num_threads(),
            )  # fmt: skip
            del kept  # read until here
        return codes, used if scale is None else used.view(scale.shape), bool(jumps)

    def _detached(self) -> "InputFusion":
        weight, bias = (None if t is None else t.detach() for t in (self.weight, self.bias))
        return self._replace(weight=weight, bias=bias)


def _normalized(fusion: InputFusion, x: Tensor) -> Tensor:
    value = x if x.dtype == torch.float64 else x.float()
    weight, bias = (None if t is None else t.to(value.dtype) for t in (fusion.weight, fusion.bias))
    if fusion.norm == "group":
        value = functional.group_norm(value, fusion.groups, weight, bias, fusion.eps)
    elif fusion.norm == "layer":
        value = functional.layer_norm(value, value.shape[-1:], None, None, fusion.eps)
        value = value if weight is None else value * _per_sample(weight, value)
        value = value if bias is None else value + _per_sample(bias, value)
    elif fusion.norm == "affine" and weight is not None and bias is not None:
        shape = (*weight.shape, *[1] * (value.dim() - 2))
        value = value * weight.reshape(shape) + bias.reshape(shape)
    elif fusion.norm == "gated" and weight is not None:
        return value * _ACTIVATIONS[fusion.activation](weight)
    return _ACTIVATIONS[fusion.activation](value)


def _per_sample(x: Tensor, like: Tensor) -> Tensor:
    return x if x.dim() == 1 else x.reshape(x.shape[0], *[1] * (like.dim() - 2), x.shape[1])


class _Plan(NamedTuple):
    """For an input of one shape and memory layout: of its codes, and how the compiled loops walk over it.

    strides: of the codes. mode: as input_fusion.cpp numbers it; None where the loops do not know the layout.
    walk, limits: their arguments. sizes: samples, pixels, channels, where the norm has groups.
    """

    layout: EncodeLayout
    strides: tuple[int, ...]
    mode: int | None
    walk: tuple[int, ...]
    limits: tuple[float, ...]
    sizes: tuple[int, int, int]


@functools.lru_cache(4096)  # asked at every call of every layer, for a few layouts
def _plan(
    norm: Norm, modulated: bool, shape: tuple[int, ...], strides: tuple[int, ...], bits: int, clip: float,
    granularity: str, channel_dim: int,
) -> _Plan:  # fmt: skip
    last, like = norm == "group_last", torch.empty_strided(shape, strides, device="meta")
    if norm == "affine":  # of some of the channels: their codes lie side by side
        codes = empty_output(like, shape, len(shape) - 2, torch.uint8).stride()
    else:
        codes = torch.empty_like(like).stride()
    layout = layout_of(shape, codes, bits, clip, granularity, -1 if last else channel_dim)
    limits, turned = (layout.factor, layout.unsent, layout.qmin, layout.qmax), (shape, strides, codes)
    if last:  # tokens of channels are pixels with channels innermost
        norm, turned, channel_dim = "group", (_last_second(shape), _last_second(strides), _last_second(codes)), 1
    sizes = (shape[0], math.prod(shape[1:-1] if last else shape[2:]), shape[-1 if last else min(1, len(shape) - 1)])
    walk = None if layout.rows is None else _walk(norm, modulated, *turned, layout.rows[0], channel_dim % len(shape))
    if walk is None:
        return _Plan(layout, codes, None, (), limits, sizes)
    mode, *numbers = walk
    return _Plan(layout, codes, mode, (*numbers, numbers[1], layout.scales[0]), limits, sizes)


def _library(fusion: InputFusion, x: Tensor, past: Past, plan: _Plan) -> ctypes.CDLL | None:
    """None where the compiled loops do not know types or layout."""
    if plan.mode is None or not x.is_cpu or x.dtype not in KINDS or not past.fits(plan.strides):
        return None
    weight = fusion.weight
    if plan.mode == 4 and (
        weight is None or (weight.dtype, weight.shape, weight.stride()) != (x.dtype, x.shape, x.stride())
    ):
        return None  # the loops read the gate as they read x
    return native.load_library("input_fusion").library or native.missing("input_fusion")


def _walk(
    norm: Norm, modulated: bool, shape: tuple[int, ...], strides: tuple[int, ...], codes: tuple[int, ...], scales: int,
    axis: int,
) -> tuple[int, ...] | None:  # fmt: skip
    """(mode, runs, length, per_sample, per_scale, pitch) for x of this shape and codes of these strides.

    "affine" and "gated" have a pitch, as some of the channels are read. Anything else must be dense, as the codes are:
    a slice, an expanded tensor or a half of a chunk is not.
    """
    numel, last = math.prod(shape), len(shape) - 1
    if numel == 0 or (norm == "gated" and axis != last) or (norm != "none" and not last):
        return None
    if norm in ("affine", "gated"):
        pixels = (shape, strides) if norm == "affine" else (_last_second(shape), _last_second(strides))
        pitch, runs = pixel_pitch(*pixels), numel // pixels[0][1]
        if pitch is None:
            return None
        mode, samples = (1, shape[0]) if norm == "affine" else (4, 1)
        return mode, runs, pixels[0][1], runs // samples, runs // scales, pitch
    contiguous = is_innermost(shape, strides, 0)
    dense = contiguous or (norm != "layer" and pixel_pitch(shape, strides) == shape[1])
    if strides != codes or not (dense or norm == "none"):
        return None
    if (norm == "layer" and axis != last) or (norm == "group" and axis != 1):
        return None  # the norm has its channels elsewhere
    innermost = not contiguous or axis == last or numel == shape[0] * shape[1]
    length = shape[axis] if innermost else numel // (shape[0] * shape[1]) if last else numel
    runs = numel // length
    samples = shape[0] if norm == "group" or modulated else 1
    mode = {"none": 0, "group": 1 if innermost else 2, "layer": 3}[norm]
    return mode, runs, length, runs // samples, runs // scales, length


def _last_second(axes: tuple[int, ...]) -> tuple[int, ...]:
    return (axes[0], axes[-1], *axes[1:-1])


def _coefficients(library: ctypes.CDLL, plan: _Plan, fusion: InputFusion, x: Tensor) -> tuple[object, list[int | None]]:
    """Where a, b, mean, rstd and gate lie, as input_fusion.cpp reads them, and what keeps them there."""
    if plan.mode == 0:
        return None, [None] * 5
    if fusion.norm in ("group", "group_last"):
        lines = _grouped_affine(library, fusion, x, plan.sizes, innermost=plan.mode == 1)
        return lines, [(at := lines.data_ptr()), at + 4 * plan.sizes[0] * plan.sizes[2], None, None, None]
    if plan.mode == 4:
        tensors: tuple[Tensor | None, ...] = None, None, None, None, fusion.weight
    else:
        w, b = _affine(fusion, x.shape[1] if fusion.norm == "affine" else plan.walk[1])
        tensors = w, b, None, None, None
        if fusion.norm == "layer":
            mean, rstd = torch.empty(2, plan.walk[0], dtype=torch.float32, device="cpu")
            library.modiff_moments(
                x.data_ptr(), KINDS[x.dtype], *plan.walk[:2], fusion.eps, mean.data_ptr(), rstd.data_ptr(),
                torch.get_num_threads(),
            )  # fmt: skip
            tensors = w, b, mean, rstd, None
    return tensors, [None if t is None else t.data_ptr() for t in tensors]


def _affine(fusion: InputFusion, channels: int) -> tuple[Tensor, Tensor]:
    weight, bias = fusion.weight, fusion.bias
    w = torch.ones(channels, dtype=torch.float32, device="cpu") if weight is None else weight.float().contiguous()
    return w, torch.zeros_like(w) if bias is None else bias.float().expand_as(w).contiguous()


def _grouped_affine(
    library: ctypes.CDLL, fusion: InputFusion, x: Tensor, sizes: tuple[int, int, int], *, innermost: bool
) -> Tensor:
    """a and b of each sample and channel, (2, N, C), float32."""
    threads, (samples, pixels, channels), (weight, bias) = torch.get_num_threads(), sizes, (fusion.weight, fusion.bias)
    tensors = [t for t in (weight, bias) if t is not None]
    if not all(t.dtype is tensors[0].dtype in KINDS and t.is_contiguous() for t in tensors):
        weight, bias = (None if t is None else t.float().contiguous() for t in (weight, bias))
    kind = KINDS[weight.dtype if weight is not None else torch.float32 if bias is None else bias.dtype]
    lines = torch.empty((2, samples, channels), dtype=torch.float32, device="cpu")
    a = lines.data_ptr()
    library.modiff_group_affine(
        x.data_ptr(), KINDS[x.dtype], samples, pixels, channels, fusion.groups, fusion.eps,
        (1 if samples >= threads else min(threads, pixels)) if innermost else 0,
        None if weight is None else weight.data_ptr(), None if bias is None else bias.data_ptr(), kind,
        a, a + 4 * samples * channels, threads,
    )  # fmt: skip
    return lines
