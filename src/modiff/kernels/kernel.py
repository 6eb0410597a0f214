"""A layer's integer operator: its weight codes, the backend that runs them, and why that one."""

import math
from typing import Any

import torch
from torch import Tensor

from modiff.errors import KernelError
from modiff.kernels.backend import Operator
from modiff.kernels.dispatch import Choice, backend_named, plan, this_machine, warn_if_slow
from modiff.kernels.encode import FixedState
from modiff.kernels.isa import Isa
from modiff.kernels.layout import Geometry, channels_innermost, empty_output, output_shape
from modiff.kernels.problem import Problem


def largest_weight_code(codes: Tensor) -> int:
    """max |code| of int8 weight codes; 8 for packed 4-bit ones. Waits for the device: call it once, when building."""
    if codes.dtype == torch.uint8 or codes.numel() == 0:
        return 8
    return int(codes.to(torch.int16).abs().max())


class Kernel:
    """ô += s * s_w[o] * sum (code - zero) * weight code, on the fastest backend that is exact.

    A convolution of kernel size 1 runs as a matmul over its pixels, one along one axis as one along two.

    Args:
        weight: int8 codes (O, I / groups, ...), or uint8 (O, ceil(n / 2)) with two 4-bit codes in a byte.
        weight_scale: (O,) or (O, 1, ...), float32.
        backend: to force one by name; None takes the first that is exact, and warns once if it is a slow one.
        isa: to pretend another machine; None asks this one, and runs the self-test.
    Raises: KernelError if the weight does not fit the problem, or for the name of no backend.
    """

    def __init__(
        self, problem: Problem, weight: Tensor, weight_scale: Tensor, *, backend: str | None = None,
        isa: Isa | None = None,
    ) -> None:  # fmt: skip
        self.problem, self.geometry = problem, problem.geometry
        self._shape, self._axes, self._pointwise = problem.weight_shape, problem.geometry.axes, problem.pointwise
        self.weight = weight
        self.weight_scale = weight_scale.reshape(-1).contiguous()  # backends read it without strides
        expected, packed = self._shape, weight.dtype == torch.uint8
        if packed:
            expected = (expected[0], -(-math.prod(expected[1:]) // 2))
        fits = tuple(self.weight.shape) == expected and self.weight_scale.numel() == expected[0]
        if not fits or not (packed or self.weight.dtype == torch.int8):
            raise KernelError(
                f"Kernel: expected int8 or uint8 weight codes of shape {expected} with {expected[0]} scales, got "
                f"{self.weight.dtype} of {tuple(self.weight.shape)} with {self.weight_scale.numel()}. The problem "
                "describes another layer. Quantize the weight, and build both from the same layer."
            )
        if backend is None:
            self.choice = plan(problem, isa)
            if isa is None:
                warn_if_slow(self.choice, this_machine(problem.device))
        else:
            self.choice = Choice(backend, "asked for")
        self.backend = backend_named(self.choice.backend)
        shape, g = self._shape, self.geometry
        if self._pointwise:
            shape, g = shape[:2], Geometry()
        elif self._axes == 1:
            shape = (*shape[:2], 1, *shape[2:])
            g = Geometry((1, *g.stride), (0, *g.padding), (1, *g.dilation), g.groups)
        if weight.dtype != torch.uint8:
            weight = weight.reshape(shape)
        scales = self.weight_scale.reshape(-1, *[1] * g.axes)
        self._operator = Operator(weight, shape, scales, g, g.axes, problem.bits, problem.weight_max)
        self._views = self._pointwise or self._axes == 1
        self._prepared: dict[tuple[Any, ...], tuple[int, Any, Any, Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_prepared": {}}  # it holds addresses

    def accumulate(self, output: Tensor, codes: Tensor, scale: Tensor) -> None:
        """Add what `codes` stand for to the output state, in place. Cost: one operator."""
        self._check_call(codes, output)
        if output.numel():
            if self._views:
                output, codes, scale = self._view(output), self._view(codes), self._view(scale)
            self.backend.accumulate(self._operator, output, codes, scale)

    def step(
        self, output: Tensor | FixedState, codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32,
        clipped: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """`accumulate`, and the new output in `dtype`, a tensor of its own. Cost: the operator and one pass over it.

        Args:
            output: the state, float; or integers, which need `clipped`: int32, one element, which counts values that
                left 16 bits. Any is a reason to start again.
        """
        state, integers = output, None
        if isinstance(output, FixedState) and clipped is not None:
            state, integers = output.n, (output.grid, clipped)
        if isinstance(state, FixedState) or (integers is None) != (clipped is None):
            raise KernelError(
                "Kernel.step: expected `clipped` with an integer state and with no other, got "
                f"{'none' if clipped is None else 'one with a float state'}. Integers that leave 16 bits must be "
                "counted. Pass torch.zeros(1, dtype=torch.int32)."
            )
        sizes = codes.shape, codes.stride(), state.shape, state.stride(), scale.shape, scale.stride()
        key, weight = (*sizes, codes.dtype, state.dtype, scale.dtype, dtype), self.weight
        edition = 0 if weight.is_inference() else weight._version  # written in place
        known, step, shape, strides = self._prepared.get(key, (-1, None, None, None))
        if known == edition:
            result = torch.empty_strided(shape, strides, dtype=dtype, device=codes.device)
            step(state, codes, scale, result, integers)
            return result
        shape = self._check_call(codes, state)
        result = empty_output(codes, shape, self._axes, dtype)
        if state.numel():
            tensors = [self._view(each) for each in (state, codes, scale, result)]
            self.backend.step(self._operator, *tensors, integers)
            if step := self.backend.prepared_step(self._operator, *tensors, integers):
                self._prepared[key] = (edition, step, shape, result.stride())
        return result

    def compute(
        self, codes: Tensor, scale: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """The layer's output for codes without memory, A(codes) + bias, channels innermost in memory."""
        shape, axes = self._check_call(codes), self._axes
        bias = None if bias is None else bias.detach()
        if not math.prod(shape):
            return empty_output(codes, shape, axes, dtype)
        result = self.backend.compute(self._operator, self._view(codes), self._view(scale), bias, dtype)
        result = self._unview(result)
        return result if channels_innermost(result, axes) else empty_output(codes, shape, axes, dtype).copy_(result)

    def sums(self, codes: Tensor) -> Tensor:
        """sum (code - zero) * weight code, exact, in int32 or a float; float32 rounds those over 2^24 once."""
        return self._unview(self.backend.sums(self._operator, self._view(codes)))

    def new_output(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Zeros in the shape of the output and in the memory layout that `accumulate` adds into without a copy."""
        shape = output_shape(codes.shape, self._shape, self.geometry)
        return empty_output(codes, shape, self._axes, dtype).zero_()

    def _view(self, x: Tensor) -> Tensor:
        if not self._views or x.dim() < 2:  # a scale for the whole tensor
            return x
        return x.movedim(1, -1) if self._pointwise else x.unsqueeze(2)

    def _unview(self, x: Tensor) -> Tensor:
        if not self._views:
            return x
        return x.movedim(-1, 1) if self._pointwise else x.squeeze(2)

    def _check_call(self, codes: Tensor, output: Tensor | None = None) -> tuple[int, ...]:
        if codes.dtype != torch.uint8:
            raise KernelError(
                f"Kernel: expected uint8 codes, got {codes.dtype}. Kernels add up integers. Encode the input with "
                "modiff.kernels.encode."
            )
        expected = output_shape(codes.shape, self._shape, self.geometry)
        if output is not None and output.shape != expected:
            raise KernelError(
                f"Kernel: expected an output state of shape {expected}, got {tuple(output.shape)}. The state belongs "
                "to another input. Start the trajectory again."
            )
        return expected
