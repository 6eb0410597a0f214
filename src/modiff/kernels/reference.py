"""The exact backend: sums in float64, where every integer below 2^53 is itself. Any device, shape and grouping."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from modiff.kernels.problem import Call

_CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


def sums(call: Call) -> Tensor:
    """sum (code - zero point) * weight code, exact, in float64. Padding adds nothing."""
    values = call.codes.to(torch.float64) - call.zero_point
    weights = call.weight_codes().to(torch.float64)
    geometry = call.geometry
    if geometry.axes == 0:
        return functional.linear(values, weights)
    slide = _CONVOLUTIONS[geometry.axes]
    return slide(values, weights, None, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)


def scaled(call: Call) -> Tensor:
    """weight scale * sums, float32: what is left is the scale of the codes."""
    return sums(call).mul_(call.weight_scale.double()).to(torch.float32)


def accumulate(output: Tensor, call: Call) -> None:
    """output += scale * weight scale * sums, in float64, rounded once to the dtype of `output`."""
    sent = sums(call).mul_(call.weight_scale.double()).mul_(call.scale.double())
    output.copy_(output.double().add_(sent))
