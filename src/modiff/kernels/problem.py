"""What a layer asks of a kernel, in numbers that a dispatch can reason about."""

import math
from dataclasses import dataclass

from modiff.errors import KernelError
from modiff.kernels.layout import Geometry

LARGEST_INT16, LARGEST_INT32 = 2**15 - 1, 2**31 - 1
"""Bounds of sums that are made in 16 and in 32 bits."""


@dataclass(frozen=True)
class Problem:
    """One linear layer or convolution on integer codes.

    inputs, outputs: channels. kernel_size: () for a linear layer. bits: of the activation codes.
    weight_max: largest magnitude among the weight codes. device: type of device that holds the codes.
    """

    inputs: int
    outputs: int
    kernel_size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    bits: int = 8
    weight_max: int = 127
    device: str = "cpu"

    def __post_init__(self) -> None:
        axes, groups = len(self.kernel_size), self.groups
        fits = {len(self.stride), len(self.padding), len(self.dilation)} == {axes} and axes <= 3
        divide = groups > 0 and not self.inputs % groups and not self.outputs % groups
        if not fits or not divide or not (2 <= self.bits <= 8 and 0 <= self.weight_max <= 128):
            raise KernelError(
                "Problem: expected stride, padding and dilation for each of at most 3 axes of the kernel, groups that "
                f"divide the channels, 2 to 8 bits and weight codes of at most 128, got {self}. A linear layer has no "
                "axes, and codes are bytes. Describe the layer as its module has it."
            )

    @property
    def summed(self) -> int:
        """Products that go into one output element."""
        return self.inputs // self.groups * math.prod(self.kernel_size)

    @property
    def largest_sum(self) -> int:
        """Bound of the sum over bytes, zero point not yet taken off."""
        return self.summed * (2**self.bits - 1) * self.weight_max

    @property
    def pointwise(self) -> bool:
        """Whether a convolution is a matmul over its pixels."""
        plain = {*self.kernel_size, *self.stride} == {1} and not any(self.padding)
        return bool(self.kernel_size) and plain and self.groups == 1

    @property
    def depthwise(self) -> bool:
        """Whether every group reads one channel and writes one."""
        return self.groups > 1 and self.groups == self.inputs == self.outputs

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(outputs, inputs / groups, *kernel_size)."""
        return (self.outputs, self.inputs // self.groups, *self.kernel_size)

    @property
    def geometry(self) -> Geometry:
        """How the kernel slides."""
        return Geometry(self.stride, self.padding, self.dilation, self.groups)
