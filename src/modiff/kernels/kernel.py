"""A layer's integer operator: its weight codes, the backend that runs them, and why that one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from modiff.errors import KernelError
from modiff.kernels import ops
from modiff.kernels.dispatch import Backend, Choice, choose_backend
from modiff.kernels.fixed_point import FixedState
from modiff.kernels.isa import Isa, detect
from modiff.kernels.layout import Geometry, empty_output, output_shape
from modiff.kernels.problem import Call, Problem
from modiff.kernels.self_test import trust


def largest_weight_code(codes: Tensor) -> int:
    """max |code| of int8 weight codes; 8 for packed 4-bit ones. Waits for the device: call it once, when building."""
    if codes.dtype == torch.uint8 or codes.numel() == 0:
        return 8
    return int(codes.to(torch.int16).abs().max())


class Kernel:
    """ô += s * s_w[o] * sum (code - zero) * weight code, on the fastest backend that is exact.

    Args:
        problem: shapes and bits.
        weight: int8 codes (O, I / groups, ...), or uint8 (O, ceil(n / 2)) with two 4-bit codes in a byte.
        weight_scale: (O,) or (O, 1, ...), float32.
        backend: to force one; None chooses.
        isa: to pretend another machine; None asks this one, and runs the self-test.
    Raises: KernelError if the weight does not fit the problem.
    """

    def __init__(
        self,
        problem: Problem,
        weight: Tensor,
        weight_scale: Tensor,
        *,
        backend: Backend | None = None,
        isa: Isa | None = None,
    ) -> None:
        self.problem = problem
        self.weight = weight
        self.weight_scale = weight_scale.reshape(-1).contiguous()  # backends read it without strides
        self._check()
        if backend is None:
            here = detect() if isa is None else isa
            ask = isa is None and here.onednn and problem.device == "cpu"
            self.choice = choose_backend(problem, here, trust() if ask else None)
        else:
            self.choice = Choice(backend, "asked for")
        self.geometry = Geometry(problem.stride, problem.padding, problem.dilation, problem.groups)
        self._channels = self.weight_scale.reshape(-1, *[1] * self.geometry.axes)

    def accumulate(self, output: Tensor, codes: Tensor, scale: Tensor) -> None:
        """Add what `codes` stand for to the output state, in place. Cost: one operator."""
        ops.add(output, self._call(codes, scale), self.choice.backend)

    def step(
        self,
        output: Tensor | FixedState,
        codes: Tensor,
        scale: Tensor,
        dtype: torch.dtype = torch.float32,
        clipped: Tensor | None = None,
    ) -> Tensor:
        """`accumulate`, and the new output in `dtype`, a tensor of its own. Cost: the operator and one pass over it.

        Args:
            output: the state, float; or integers (`fixed_point.start`), which need `clipped`: int32, one element, to
                which the number of values that left 16 bits is added. Any is a reason to start again.
        """
        state, grid = (output.n, output.grid) if isinstance(output, FixedState) else (output, None)
        if (grid is None) != (clipped is None):
            raise KernelError(
                "Kernel.step: expected `clipped` with an integer state and with no other, got "
                f"{'none' if clipped is None else 'one with a float state'}. Integers that leave 16 bits must be "
                "counted. Pass torch.zeros(1, dtype=torch.int32)."
            )
        return ops.add_and_give(state, grid, clipped, self._call(codes, scale), self.choice.backend, dtype)

    def compute(
        self, codes: Tensor, scale: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """The layer's output for codes without memory: A(codes) + bias."""
        bias = None if bias is None else bias.detach()
        return ops.give(self._call(codes, scale), bias, self.choice.backend, dtype)

    def new_output(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Zeros in the shape of the output and in the memory layout that `accumulate` adds into without a copy."""
        shape = output_shape(codes.shape, self.problem.weight_shape, self.geometry)
        return empty_output(codes, shape, self.geometry.axes, dtype).zero_()

    def _call(self, codes: Tensor, scale: Tensor) -> Call:
        p = self.problem
        return Call(codes, self.weight, p.weight_shape, self._channels, scale, self.geometry, p.bits, p.weight_max)

    def _check(self) -> None:
        p = self.problem
        per_row = math.prod(p.weight_shape[1:])
        packed = self.weight.dtype == torch.uint8
        expected = (p.outputs, -(-per_row // 2)) if packed else p.weight_shape
        if tuple(self.weight.shape) != expected or self.weight_scale.numel() != p.outputs:
            raise KernelError(
                f"Kernel: expected weight codes of shape {expected} with {p.outputs} scales, got "
                f"{tuple(self.weight.shape)} with {self.weight_scale.numel()}. The problem describes another layer. "
                "Build both from the same layer."
            )
        if not packed and self.weight.dtype != torch.int8:
            raise KernelError(
                f"Kernel: expected int8 weight codes, got {self.weight.dtype}. Kernels add up integers. Quantize the "
                "weight first."
            )
