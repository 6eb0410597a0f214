"""The integer backend of CPUs: PyTorch's oneDNN operators on uint8 activations and int8 weights.

Signed activations are never used: without AMX they run on a reference kernel that takes 10,000 times as long.
Without VNNI the sum of two products saturates at 16 bits and the result is silently wrong: `dispatch` rules that out.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from modiff.kernels.exact import add_scaled
from modiff.kernels.layout import Geometry
from modiff.kernels.prepacked import PREPACKED
from modiff.kernels.problem import Call

_IN_PLACE = (torch.float32, torch.bfloat16)


def sums(call: Call) -> Tensor:
    """sum (code - zero point) * weight code, made in int32 and rounded once, to float32."""
    ones = torch.ones_like(call.weight_scale, dtype=torch.float32)
    return _compute(call._replace(weight_scale=ones), _one(), None, torch.float32)


def scaled(call: Call) -> Tensor:
    """weight scale * sums, float32: what is left is the scale of the codes."""
    return _compute(call, _one(), None, torch.float32)


def accumulate(output: Tensor, call: Call) -> None:
    """output += scale * weight scale * sums; in the operator itself where there is one scale."""
    if call.scale.numel() == 1 and output.dtype in _IN_PLACE and _add_inside(output, call):
        return
    add_scaled(output, scaled(call), call.scale)


def compute(call: Call, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """scale * weight scale * sums + bias in one operator; None where the scale differs within the tensor."""
    if call.scale.numel() != 1 or dtype not in _IN_PLACE:
        return None
    return _compute(call, call.scale, None if bias is None else bias.float(), dtype)


def _compute(call: Call, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    weight, zeros = _weight(call)
    channels, zero = call.weight_scale.flatten(), _zero_point(call.zero_point)
    if call.geometry.axes == 0:
        rows = call.codes.reshape(-1, call.shape[1])
        found = torch.ops.onednn.qlinear_pointwise.tensor(
            rows, scale, zero, weight, channels, zeros, bias, 1.0, 0, dtype, "none", [], ""
        )
        return found.view(call.output_shape)
    g = _flat(call.geometry)
    codes = call.codes if call.geometry.axes == 2 else call.codes.unsqueeze(2)
    found = torch.ops.onednn.qconv_pointwise.tensor(
        codes, scale, zero, weight, channels, zeros, bias, g.stride, g.padding, g.dilation, g.groups,
        1.0, 0, dtype, "none", [], "",
    )  # fmt: skip
    return found if call.geometry.axes == 2 else found.squeeze(2)


def _add_inside(output: Tensor, call: Call) -> bool:
    """Let the operator add into `output`; False where its layout is not the operator's."""
    weight, zeros = _weight(call)
    channels, zero = call.weight_scale.flatten(), _zero_point(call.zero_point)
    if call.geometry.axes == 0:
        if not output.is_contiguous():
            return False
        target = output.view(-1, call.shape[0])
        found = torch.ops.onednn.qlinear_pointwise.binary_tensor(
            call.codes.reshape(-1, call.shape[1]), call.scale, zero, weight, channels, zeros, target, None,
            1.0, 0, output.dtype, 1.0, 0, "sum", 1.0, "none", [], "",
        )  # fmt: skip
        if found.data_ptr() != target.data_ptr():
            target.copy_(found)
        return True
    target = output if call.geometry.axes == 2 else output.unsqueeze(2)
    if not target.is_contiguous(memory_format=torch.channels_last):
        return False
    g = _flat(call.geometry)
    codes = call.codes if call.geometry.axes == 2 else call.codes.unsqueeze(2)
    torch.ops.onednn.qconv2d_pointwise.binary_tensor(
        codes, call.scale, zero, weight, channels, zeros, target, None, g.stride, g.padding, g.dilation, g.groups,
        1.0, 0, output.dtype, 1.0, 0, "sum", 1.0, "none", [], "",
    )  # fmt: skip
    return True


def _weight(call: Call) -> tuple[Tensor, Tensor]:
    """(weight in the operator's layout, its zero points), remembered."""
    packed, zeros = PREPACKED.get(
        call.weight, ("onednn", call.shape, call.geometry, call.zero_point), lambda: _pack(call)
    )
    return packed, zeros


def _pack(call: Call) -> tuple[Tensor, Tensor]:
    codes, zeros = call.weight_codes(), torch.zeros(call.shape[0], dtype=torch.int64, device="cpu")
    if call.geometry.axes == 0:
        return torch.ops.onednn.qlinear_prepack(codes.contiguous(), None), zeros
    g, ones = _flat(call.geometry), torch.ones(call.shape[0], dtype=torch.float32, device="cpu")
    codes = (codes if call.geometry.axes == 2 else codes.unsqueeze(2)).contiguous()
    shape = list(call.codes.shape if call.geometry.axes == 2 else call.codes.unsqueeze(2).shape)
    packed = torch.ops.onednn.qconv_prepack(
        codes, ones, 1.0, call.zero_point, g.stride, g.padding, g.dilation, g.groups, shape
    )
    return packed, zeros


def _flat(geometry: Geometry) -> Geometry:
    """A convolution along one axis as one along two."""
    if geometry.axes == 2:
        return geometry
    return Geometry((1, *geometry.stride), (0, *geometry.padding), (1, *geometry.dilation), geometry.groups)


@functools.cache
def _one() -> Tensor:
    return torch.ones((), dtype=torch.float32, device="cpu")


@functools.cache
def _zero_point(value: int) -> Tensor:
    return torch.tensor(value, device="cpu")
