"""Two backends on floats, exact because float64 holds every integer up to 2^53 and float32 every one up to 2^24."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from modiff.kernels.backend import PREPACKED, Backend, Operator
from modiff.kernels.isa import Isa
from modiff.kernels.layout import Geometry
from modiff.kernels.problem import LARGEST_INT32, Problem

EXACT = 2**24
"""float32 holds every integer up to this one, so no partial sum is rounded, in whatever order it is made."""
_CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


class Reference(Backend):
    """Sums in float64: any device, shape and grouping."""

    name = "reference"
    slow = "float64 sums, slow"

    def unsupported(self, problem: Problem, isa: Isa) -> str:
        """Empty: no layer has 2^38 products of two bytes."""
        return ""

    def sums(self, operator: Operator, codes: Tensor) -> Tensor:
        """sum (code - zero point) * weight code, in float64. Padding adds nothing."""
        values = codes.to(torch.float64) - operator.zero_point
        weights, g = operator.weight_codes().to(torch.float64), operator.geometry
        if operator.axes == 0:
            return functional.linear(values, weights)
        return _CONVOLUTIONS[operator.axes](values, weights, None, g.stride, g.padding, g.dilation, g.groups)

    def scaled(self, operator: Operator, codes: Tensor) -> Tensor:
        """weight scale * sums, rounded once to float32."""
        return self.sums(operator, codes).mul_(operator.weight_scale.double()).to(torch.float32)

    def accumulate(self, operator: Operator, output: Tensor, codes: Tensor, scale: Tensor) -> None:
        """output += scale * weight scale * sums, in float64, rounded once to the dtype of `output`."""
        sent = self.sums(operator, codes).mul_(operator.weight_scale.double()).mul_(scale.double())
        output.copy_(output.double().add_(sent))


class FloatExact(Backend):
    """Integer sums on float32 hardware: exact while they stay below 2^24, so longer ones are cut into chunks.

    For processors without VNNI, where oneDNN's integer kernels saturate and `torch._int_mm` takes 50 times as long.
    Cost: a float32 copy of the weight, 4 bytes a weight.
    """

    name = "float_exact"
    devices = ("cpu",)

    def unsupported(self, problem: Problem, isa: Isa) -> str:
        """Why float32 sums must not run the problem; empty if they may."""
        if problem.kernel_size and not problem.pointwise and not isa.onednn:
            return "without oneDNN a float32 convolution may take an inexact algorithm"
        if chunk_of(problem.bits, problem.weight_max, problem.kernel_size) == 0:
            return "one channel's products alone pass 2^24"
        if problem.largest_sum > LARGEST_INT32:
            return "chunks are added in 32 bits"
        return ""

    def reason(self, problem: Problem, isa: Isa) -> str:
        """One line for the report: how many chunks."""
        chunk = chunk_of(problem.bits, problem.weight_max, problem.kernel_size)
        count = -(-problem.inputs // problem.groups // chunk)
        return f"float32 sums, exact in {count} chunk{'s' * (count > 1)}"

    def sums(self, operator: Operator, codes: Tensor) -> Tensor:
        """sum (code - zero point) * weight code: float32 where one chunk takes all channels, otherwise int32."""
        g, channels = operator.geometry, operator.shape[1]
        chunk = chunk_of(operator.bits, operator.weight_max, operator.shape[2:])
        weights = PREPACKED.get(
            operator.weight,
            ("float_exact", operator.shape, chunk),
            lambda: tuple(some.to(torch.float32).contiguous() for some in operator.weight_codes().split(chunk, 1)),
        )
        values = codes.to(torch.float32).sub_(operator.zero_point)
        if len(weights) == 1:
            return _product(values, weights[0], g)
        grouped = values.unflatten(1, (g.groups, channels)) if operator.axes else values
        total = torch.zeros((), dtype=torch.int32)
        for index, weight in enumerate(weights):
            some = grouped.narrow(2 if operator.axes else -1, index * chunk, weight.shape[1])
            product = _product(some.flatten(1, 2) if operator.axes else some, weight, g).to(torch.int32)
            total = product if index == 0 else total.add_(product)
        return total


def chunk_of(bits: int, weight_max: int, kernel_size: tuple[int, ...]) -> int:
    """Input channels of a group that one float32 sum may take; 0 if even one is too many.

    >>> chunk_of(8, 128, ()), chunk_of(8, 128, (3, 3)), chunk_of(4, 127, ())
    (1024, 113, 16512)
    """
    return EXACT // (2 ** (bits - 1) * max(weight_max, 1) * math.prod(kernel_size))


def _product(values: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    if not geometry.stride:
        return functional.linear(values, weight)
    # not functional.conv2d: with oneDNN switched off it may take Winograd's algorithm, which rounds
    return torch.ops.aten.mkldnn_convolution(
        values, weight, None, geometry.padding, geometry.stride, geometry.dilation, geometry.groups
    )


REFERENCE, FLOAT_EXACT = Reference(), FloatExact()
