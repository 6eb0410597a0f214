"""What every kernel does with its backend: check, turn pointwise convolutions into matmuls, add, give the output."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from modiff.errors import KernelError
from modiff.kernels import exact, onednn, reference
from modiff.kernels.dispatch import BACKENDS
from modiff.kernels.epilogue import add_sent
from modiff.kernels.layout import Geometry, channels_innermost, empty_output
from modiff.kernels.problem import Call
from modiff.kernels.triton import backend as gpu

_MODULES: dict[str, ModuleType] = {"reference": reference, "float_exact": exact, "onednn": onednn, "triton": gpu}


def add(output: Tensor, call: Call, backend: str) -> None:
    """output += scale * weight_scale[o] * sums."""
    _check(output, call)
    if output.numel():
        call, output = _pointwise(call, output)
        _module(backend).accumulate(output, call)


def add_and_give(
    output: Tensor, grid: Tensor | None, clipped: Tensor | None, call: Call, backend: str, dtype: torch.dtype
) -> Tensor:
    """The same, and a copy of the new state in `dtype`, channels innermost in memory."""
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


def give(call: Call, bias: Tensor | None, backend: str, dtype: torch.dtype) -> Tensor:
    """scale * weight_scale[o] * sums + bias, channels innermost in memory."""
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


def sums(call: Call, backend: str) -> Tensor:
    """The integer sums of one backend, as floats or integers that hold them; float32 rounds those over 2^24."""
    output = empty_output(call.codes, call.output_shape, call.geometry.axes, torch.float32)
    moved, _ = _pointwise(call, output)
    found = _module(backend).sums(moved)
    return found if moved.geometry == call.geometry else found.movedim(-1, 1)


def _copied(output: Tensor, target: Tensor, found: Tensor) -> Tensor:
    target.copy_(found)
    return output


def _check_codes(call: Call) -> None:
    if call.codes.dtype != torch.uint8 or call.weight.dtype not in (torch.int8, torch.uint8):
        raise KernelError(
            f"kernel: expected uint8 codes and int8 (or packed uint8) weight codes, got {call.codes.dtype} and "
            f"{call.weight.dtype}. Kernels add up integers. Code the input with modiff.kernels.encode."
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
