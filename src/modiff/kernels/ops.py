"""The one operator schema of all backends, registered with torch: what a traced graph holds of a kernel.

    modiff::accumulate    output += scale * weight_scale[o] * sum (code - zero) * weight code      in place
    modiff::step          the same, and the layer's output in the dtype of the model              in place, a new tensor
    modiff::compute       the same from zero, plus the bias                                       a new tensor

A linear layer gives no strides. `backend` is decided before, by `dispatch`; nothing here waits for a device.

torch's dispatcher takes 50 to 100 us for an operator written in Python, so outside of a traced graph `Kernel` calls the
functions behind the operators, `add`, `add_and_give` and `give`.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from modiff.errors import KernelError
from modiff.kernels import float_exact, onednn, reference
from modiff.kernels.call import Call
from modiff.kernels.dispatch import BACKENDS
from modiff.kernels.epilogue import add_sent
from modiff.kernels.geometry import Geometry, channels_innermost, empty_output, output_shape
from modiff.kernels.triton import backend as gpu

_MODULES: dict[str, ModuleType] = {
    "reference": reference,
    "float_exact": float_exact,
    "onednn": onednn,
    "triton": gpu,
}


def accumulate_now(
    output: Tensor,
    codes: Tensor,
    weight: Tensor,
    shape: Sequence[int],
    weight_scale: Tensor,
    scale: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bits: int,
    weight_max: int,
    backend: str,
) -> None:
    """output += scale * weight_scale[o] * sums.

    Args:
        output: the output state, (N, O, ...) or (..., O); any float dtype; fastest with channels innermost in memory.
        codes: uint8, zero = 2^(bits - 1), (N, I, ...) or (..., I).
        weight: int8 codes (O, I / groups, ...), or uint8 with two 4-bit codes in a byte; shape: of the codes.
        weight_scale: (O,). scale: one element, or broadcastable to the output: one for each sample or token.
        weight_max: bound of |weight code|.
    """
    geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    add(output, _call(codes, weight, shape, weight_scale, scale, geometry, bits, weight_max), backend)


def add(output: Tensor, call: Call, backend: str) -> None:
    """What modiff::accumulate does."""
    _check(output, call)
    if output.numel():
        call, output = _pointwise(call, output)
        _module(backend).accumulate(output, call)


accumulate = torch.library.custom_op("modiff::accumulate", accumulate_now, mutates_args=("output",))


@accumulate.register_fake
def _(output: Tensor, *_others: object) -> None:
    return None


def step_now(
    output: Tensor,
    grid: Tensor | None,
    clipped: Tensor | None,
    codes: Tensor,
    weight: Tensor,
    shape: Sequence[int],
    weight_scale: Tensor,
    scale: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bits: int,
    weight_max: int,
    backend: str,
    dtype: torch.dtype,
) -> Tensor:
    """output += scale * weight_scale[o] * sums, and a copy of it in `dtype`, channels innermost in memory.

    Args:
        grid, clipped: where `output` is int16 in units of grid; clipped (int32, one element) counts what was cut.
    """
    geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    call = _call(codes, weight, shape, weight_scale, scale, geometry, bits, weight_max)
    return add_and_give(output, grid, clipped, call, backend, dtype)


def add_and_give(
    output: Tensor, grid: Tensor | None, clipped: Tensor | None, call: Call, backend: str, dtype: torch.dtype
) -> Tensor:
    """What modiff::step does."""
    _check(output, call)
    geometry = call.geometry
    result = empty_output(call.codes, call.output_shape, geometry.axes, dtype)
    if not result.numel():
        return result
    call, target = _pointwise(call, output)
    module = _module(backend)
    if grid is None and call.scale.numel() == 1 and module is onednn:  # the operator adds by itself
        module.accumulate(target, call)
        return result.copy_(output)
    moved = result if call.geometry == geometry else result.movedim(1, -1)
    if grid is None and module is gpu:
        gpu.step(target, call, moved)
        return result
    add_sent(target, grid, clipped, module.scaled(call), call.scale, call.geometry.axes, moved)
    return result


step = torch.library.custom_op("modiff::step", step_now, mutates_args=("output", "clipped"))


@step.register_fake
def _(
    output: Tensor,
    grid: Tensor | None,
    clipped: Tensor | None,
    codes: Tensor,
    weight: Tensor,
    shape: Sequence[int],
    weight_scale: Tensor,
    scale: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bits: int,
    weight_max: int,
    backend: str,
    dtype: torch.dtype,
) -> Tensor:
    geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    return empty_output(codes, output_shape(codes.shape, shape, geometry), geometry.axes, dtype)


def compute_now(
    codes: Tensor,
    weight: Tensor,
    shape: Sequence[int],
    weight_scale: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bits: int,
    weight_max: int,
    backend: str,
    dtype: torch.dtype,
) -> Tensor:
    """scale * weight_scale[o] * sums + bias, channels innermost in memory; arguments as `accumulate` has them."""
    geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    return give(_call(codes, weight, shape, weight_scale, scale, geometry, bits, weight_max), bias, backend, dtype)


def give(call: Call, bias: Tensor | None, backend: str, dtype: torch.dtype) -> Tensor:
    """What modiff::compute does."""
    _check_codes(call)
    geometry = call.geometry
    output = empty_output(call.codes, call.output_shape, geometry.axes, dtype)
    if not output.numel():
        return output
    call, target = _pointwise(call, output)
    module = _module(backend)
    if module in (onednn, gpu):
        found = module.compute(call, bias, dtype)
        if found is not None:
            same = geometry.axes == call.geometry.axes and channels_innermost(found, geometry.axes)
            return found if same else _copied(output, target, found)
    if bias is None:
        output.zero_()
    else:
        output.copy_(bias.reshape(-1, *[1] * geometry.axes).expand_as(output))
    module.accumulate(target, call)
    return output


compute = torch.library.custom_op("modiff::compute", compute_now, mutates_args=())


@compute.register_fake
def _(
    codes: Tensor,
    weight: Tensor,
    shape: Sequence[int],
    weight_scale: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bits: int,
    weight_max: int,
    backend: str,
    dtype: torch.dtype,
) -> Tensor:
    geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    return empty_output(codes, output_shape(codes.shape, shape, geometry), geometry.axes, dtype)


def sums(call: Call, backend: str) -> Tensor:
    """The integer sums of one backend, as floats or integers that hold them; float32 rounds those over 2^24."""
    output = empty_output(call.codes, call.output_shape, call.geometry.axes, torch.float32)
    moved, _ = _pointwise(call, output)
    found = _module(backend).sums(moved)
    return found if moved.geometry == call.geometry else found.movedim(-1, 1)


def _copied(output: Tensor, target: Tensor, found: Tensor) -> Tensor:
    target.copy_(found)
    return output


def _call(
    codes: Tensor,
    weight: Tensor,
    shape: Sequence[int],
    weight_scale: Tensor,
    scale: Tensor,
    geometry: Geometry,
    bits: int,
    weight_max: int,
) -> Call:
    channels = weight_scale.reshape(-1, *[1] * geometry.axes)
    return Call(codes, weight, tuple(shape), channels, scale, geometry, bits, weight_max)


def _check_codes(call: Call) -> None:
    if call.codes.dtype != torch.uint8 or call.weight.dtype not in (torch.int8, torch.uint8):
        raise KernelError(
            f"kernel: expected uint8 codes and int8 (or packed uint8) weight codes, got {call.codes.dtype} and "
            f"{call.weight.dtype}. Kernels add up integers. Code the input with modiff.kernels.prologue."
        )


def _check(output: Tensor, call: Call) -> None:
    _check_codes(call)
    if tuple(output.shape) != call.output_shape:
        raise KernelError(
            f"accumulate: expected an output state of shape {call.output_shape}, got {tuple(output.shape)}. "
            "The state belongs to another input. Start the trajectory again."
        )


def _pointwise(call: Call, output: Tensor) -> tuple[Call, Tensor]:
    """A convolution of kernel size 1 as a matmul over its pixels; anything else as it is."""
    geometry = call.geometry
    if geometry.axes == 0 or geometry.groups > 1 or any(geometry.padding):
        return call, output
    if {*geometry.stride, *call.shape[2:]} != {1}:
        return call, output
    scale = call.scale if call.scale.numel() == 1 else call.scale.movedim(1, -1)
    weight = call.weight if call.weight.dtype == torch.uint8 else call.weight.flatten(1)
    moved = Call(
        call.codes.movedim(1, -1), weight, call.shape[:2], call.weight_scale.flatten(), scale, Geometry(), call.bits,
        call.weight_max,
    )  # fmt: skip
    return moved, output.movedim(1, -1)


def _module(backend: str) -> ModuleType:
    if backend not in _MODULES:
        raise KernelError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}. Name one of them.")
    return _MODULES[backend]
