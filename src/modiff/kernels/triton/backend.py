"""The integer backend of CUDA GPUs: Triton kernels, imported at first use.

PyTorch has an int8 matmul on CUDA and no int8 convolution; these add into the output state in their epilogue.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from modiff.config import Granularity
from modiff.kernels.layout import Geometry, as_rows, channels_innermost, empty_output
from modiff.kernels.prepacked import PREPACKED
from modiff.kernels.problem import Call, Problem

_STATES = (torch.float32, torch.float16, torch.bfloat16)
_INT32 = 2**31 - 1


def interpreted() -> bool:
    """Whether Triton's interpreter runs its kernels, which needs no GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def installed() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def gpu_obstacle(problem: Problem) -> str:
    """Why these kernels must not run a problem; empty if they may."""
    if problem.device != "cuda" and not (problem.device == "cpu" and interpreted()):
        return f"Triton runs on GPUs, the codes are on {problem.device}"
    if not installed():
        return "Triton is not installed"
    if problem.groups > 1:
        return "grouped convolutions have no Triton kernel"
    if len(problem.kernel_size) > 2:
        return "convolutions of three axes have no Triton kernel"
    if problem.largest_sum > _INT32:
        return f"a sum of {problem.summed} products may pass 32 bits"
    return ""


def sums(call: Call) -> Tensor:
    """sum (code - zero point) * weight code, int32."""
    output = empty_output(call.codes, call.output_shape, call.geometry.axes, torch.int32)
    _run(call, output=output)
    return output


def scaled(call: Call) -> Tensor:
    """weight scale * sums, float32: what is left is the scale of the codes."""
    output = empty_output(call.codes, call.output_shape, call.geometry.axes, torch.float32)
    _run(call._replace(scale=torch.ones(1, device=call.codes.device)), output=output)
    return output


def accumulate(output: Tensor, call: Call) -> None:
    """output += scale * weight scale * sums, in the kernel itself."""
    step(output, call, None)


def step(state: Tensor, call: Call, output: Tensor | None) -> None:
    """The same, and the new state into `output` as well; both with channels innermost in memory, or through copies."""
    axes = call.geometry.axes
    dense = channels_innermost(state, axes) and state.dtype in _STATES
    held = state if dense else empty_output(call.codes, call.output_shape, axes, torch.float32).copy_(state)
    _run(call, state=held, output=output)
    if not dense:
        state.copy_(held)


def compute(call: Call, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """scale * weight scale * sums + bias in one kernel; None for a dtype that it does not write."""
    if dtype not in _STATES:
        return None
    output = empty_output(call.codes, call.output_shape, call.geometry.axes, dtype)
    _run(call, output=output, bias=bias)
    return output


def code(
    x: Tensor,
    state: Tensor | None,
    codes: Tensor,
    scale: Tensor,
    bits: int,
    clip: float,
    granularity: Granularity,
    channel_dim: int,
    *,
    dynamic: bool,
) -> bool:
    """Code x against its state in place; False where layout or types are not the kernels', and nothing was touched."""
    if x.device.type != "cuda" and not interpreted():
        return False
    if not installed() or scale.dtype != torch.float32 or not scale.is_contiguous():
        return False
    dense = [t for t in (x, state, codes) if t is not None]
    rows = [as_rows(t, granularity, channel_dim) for t in dense]
    if any(r is None for r in rows) or any(t.stride() != x.stride() for t in dense):
        return False
    if state is not None and state.dtype not in _STATES:
        return False
    from modiff.kernels.triton.encode import code_rows

    found = [torch.as_tensor(r) for r in rows]
    held = found[1] if state is not None else None
    with _on_device_of(x):
        code_rows(found[0], held, found[-1], scale.view(-1), bits, clip, dynamic=dynamic)
    return True


def _on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton starts kernels on the present device, wherever their tensors lie."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _run(call: Call, *, state: Tensor | None = None, output: Tensor | None = None, bias: Tensor | None = None) -> None:
    with _on_device_of(call.codes):
        _launch(call, state, output, bias)


def _launch(call: Call, state: Tensor | None, output: Tensor | None, bias: Tensor | None) -> None:
    from modiff.kernels.triton.conv import run_conv
    from modiff.kernels.triton.linear import run_linear

    weight, scales = _weight(call), call.weight_scale.flatten().to(torch.float32)
    scale = call.scale.to(torch.float32).contiguous()
    if call.geometry.axes == 0:
        depth, columns = call.shape[1], call.shape[0]
        flat = [None if t is None else t.view(-1, columns) for t in (state, output)]
        run_linear(call.codes.reshape(-1, depth), weight, scales, scale, call.zero_point, state=flat[0],
                   output=flat[1], bias=bias)  # fmt: skip
        return
    codes, both = call.codes, [state, output]
    if call.geometry.axes == 1:
        codes, both = codes.unsqueeze(2), [None if t is None else t.unsqueeze(2) for t in both]
    codes = codes.movedim(1, -1).contiguous().movedim(-1, 1)
    run_conv(codes, weight, scales, scale, call.zero_point, _flat(call.geometry), state=both[0], output=both[1],
             bias=bias)  # fmt: skip


def _weight(call: Call) -> Tensor:
    """The weight codes as the kernels read them, remembered."""

    def make() -> tuple[Tensor, ...]:
        codes = call.weight_codes()
        if call.geometry.axes == 0:
            return (codes.contiguous(),)
        from modiff.kernels.triton.conv import packed_conv

        return (packed_conv(codes if call.geometry.axes == 2 else codes.unsqueeze(2)),)

    return PREPACKED.get(call.weight, ("gpu", call.shape, call.geometry.axes), make)[0]


def _flat(geometry: Geometry) -> Geometry:
    """A convolution along one axis as one along two."""
    if geometry.axes == 2:
        return geometry
    return Geometry((1, *geometry.stride), (0, *geometry.padding), (1, *geometry.dilation), geometry.groups)
