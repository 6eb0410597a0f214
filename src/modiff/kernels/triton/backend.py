"""The integer backend of CUDA GPUs: Triton kernels, imported at first use.

PyTorch has an int8 matmul on CUDA and no int8 convolution; these add into the output state in their epilogue.
"""

import functools
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from modiff.kernels.backend import PREPACKED, Backend, Operator
from modiff.kernels.epilogue import Integers
from modiff.kernels.isa import Isa
from modiff.kernels.layout import channels_innermost, innermost
from modiff.kernels.problem import LARGEST_INT32, Problem

STATES = (torch.float32, torch.float16, torch.bfloat16)
"""The types of states that the kernels read and write."""
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's interpreter runs the kernels, which needs no GPU; Triton asks once, at its import."""


@functools.cache
def installed() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


class Triton(Backend):
    """int8 products summed in int32; state, bias and output are dealt with in the same kernel."""

    name = "triton"
    devices = ("cuda",)

    def unsupported(self, problem: Problem, isa: Isa) -> str:
        """Why these kernels must not run a problem; empty if they may."""
        if not installed():
            return "Triton is not installed"
        if problem.groups > 1:
            return "grouped convolutions have no Triton kernel"
        if len(problem.kernel_size) > 2:
            return "convolutions of three axes have no Triton kernel"
        if problem.largest_sum > LARGEST_INT32:
            return f"a sum of {problem.summed} products may pass 32 bits"
        return ""

    def reason(self, problem: Problem, isa: Isa) -> str:
        """One line for the report."""
        return "Triton, sums in 32 bits"

    def sums(self, operator: Operator, codes: Tensor) -> Tensor:
        """sum (code - zero point) * weight code, int32."""
        return _made(operator, codes, torch.int32)

    def scaled(self, operator: Operator, codes: Tensor) -> Tensor:
        """weight scale * sums, float32: what is left is the scale of the codes."""
        return _made(operator, codes, torch.float32)

    def accumulate(self, operator: Operator, output: Tensor, codes: Tensor, scale: Tensor) -> None:
        """output += scale * weight scale * sums, in the kernel itself."""
        _add(operator, output, codes, scale, None)

    def step(
        self, operator: Operator, state: Tensor, codes: Tensor, scale: Tensor, output: Tensor, integers: Integers = None
    ) -> None:
        """`accumulate`, and the new state into `output`, in one kernel; integer states take a pass of their own."""
        if integers is None:
            _add(operator, state, codes, scale, output)
        else:
            super().step(operator, state, codes, scale, output, integers)

    def compute(
        self, operator: Operator, codes: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """scale * weight scale * sums + bias in one kernel, for the types that it writes."""
        if dtype not in STATES:
            return super().compute(operator, codes, scale, bias, dtype)
        output = operator.new_output(codes, dtype)
        _run(operator, codes, scale, None, output, bias)
        return output


TRITON = Triton()


def _add(operator: Operator, state: Tensor, codes: Tensor, scale: Tensor, output: Tensor | None) -> None:
    dense = channels_innermost(state, operator.axes) and state.dtype in STATES
    target = state if dense else operator.new_output(codes, torch.float32).copy_(state)
    _run(operator, codes, scale, target, output)
    if not dense:
        state.copy_(target)


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton starts kernels on the present device, wherever their tensors lie."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _made(operator: Operator, codes: Tensor, dtype: torch.dtype) -> Tensor:
    output = operator.new_output(codes, dtype)
    _run(operator, codes, torch.ones(1, device=codes.device), None, output)
    return output


def _run(
    operator: Operator, codes: Tensor, scale: Tensor, state: Tensor | None, output: Tensor | None, bias: Any = None
) -> None:
    from modiff.kernels.triton.loops import run_conv, run_linear

    weight, channels, zero = _weight(operator), operator.weight_scale.flatten().to(torch.float32), operator.zero_point
    scale = scale.to(torch.float32).contiguous()
    with on_device_of(codes):
        if operator.axes:
            codes = innermost(codes)
            run_conv(codes, weight, channels, scale, zero, operator.geometry, state=state, output=output, bias=bias)
        else:
            state, output = (t if t is None else t.view(-1, operator.shape[0]) for t in (state, output))
            rows = codes.reshape(-1, operator.shape[1])
            run_linear(rows, weight, channels, scale, zero, state=state, output=output, bias=bias)


def _weight(operator: Operator) -> Tensor:

    def make() -> tuple[Tensor, ...]:
        codes = operator.weight_codes()
        return ((codes.permute(0, 2, 3, 1) if operator.axes else codes).contiguous(),)

    return PREPACKED.get(operator.weight, ("triton", operator.shape), make)[0]
