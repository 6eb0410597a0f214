"""What a variant of the loop benchmark is made of, and the floats that all are built on: eager and compiled."""

import importlib
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loop.models import Inputs, Loop, LoopModel, Step, of_rows, repeated
from modiff.kernels.isa import detect

GRAPHS = "reduce-overhead"
"""torch.compile's mode on GPUs: inductor's kernels, a whole step launched as one CUDA graph."""
CALIBRATION_SEED = 1_000_000
"""Ranges and choices come from noise that no figure is judged on."""
BF16_LIMITS = ("", "AVX512_CORE_AMX", "AVX512_CORE_BF16", "AVX512_CORE_FP16")


class CannotRun(Exception):
    """This machine, or this version, has no such variant; the message says why."""


@dataclass(frozen=True)
class Task:
    """One variant of one model. `timed` and `steps` are those of the loop that it is compared with.

    mode: of torch.compile on GPUs.
    """

    model: LoopModel
    variant: str
    timed: int
    device: str = "cpu"
    threads: int | None = None
    limit: str = ""
    mode: str = GRAPHS


@dataclass
class Ready:
    """A variant that can run: `loop.run(step, seed)` inside `begin()`; `state` counts bytes at the end of a loop.

    note: what was decided only here.
    """

    loop: Loop
    step: Step
    begin: Callable[[], AbstractContextManager[Any]] = nullcontext
    state: Callable[[], int] = field(default=lambda: 0)
    note: str = ""


@dataclass(frozen=True)
class Parts:
    """What a variant is made of."""

    task: Task
    net: nn.Module
    inputs: Inputs
    loop: Loop

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.loop.device


def has_bf16(capabilities: Mapping[str, Any], limit: str, device: str) -> bool:
    """Whether bf16 is faster than float32 here: a GPU, or a processor with instructions for it that it may use."""
    if device != "cpu":
        return True
    return limit in BF16_LIMITS and bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def best_dtype(task: Task) -> torch.dtype:
    """Of the opponents that come in either width: bf16 where the device has instructions for it, else float32."""
    return torch.bfloat16 if has_bf16(torch.cpu.get_capabilities(), task.limit, task.device) else torch.float32


def parts_of(task: Task) -> Parts:
    """Model, inputs and loop on the device."""
    device = torch.device(task.device)
    net, inputs, scheduler = task.model.build(device)
    loop = Loop(task.model, scheduler, task.model.steps, task.timed, device)
    arguments = of_rows(repeated(inputs, task.model.size[0]), lambda rows: rows.to(device))
    return Parts(task, net.to(device), arguments, loop)


def in_dtype(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Float tensors cast, others as they are."""
    return of_rows(inputs, lambda rows: rows.to(dtype) if rows.is_floating_point() else rows)


def cast(parts: Parts, dtype: torch.dtype) -> nn.Module:
    """The network in `dtype`; on GPUs with channels innermost, which their convolutions want."""
    net = parts.net.to(dtype)
    return net if parts.device.type == "cpu" else net.to(memory_format=torch.channels_last)


def compiler(device: torch.device, mode: str = "default") -> Callable[..., Any]:
    """torch.compile, on CPUs with frozen weights, on GPUs in a mode of its own.

    Raises: CannotRun on a CPU where there is no C++ compiler.
    """
    import torch._inductor.config as inductor

    if device.type == "cpu":
        if not any(shutil.which(name) for name in ("g++", "clang++", "cl")):
            raise CannotRun("no C++ compiler: torch.compile needs g++ or clang++")
        inductor.freezing = True  # weights become constants, prepacked for oneDNN; needs inference mode
        mode = "default"
    return partial(torch.compile, dynamic=False, mode=mode)


def step_of(call: Callable[..., Any], inputs: Inputs, dtype: torch.dtype, channels: int) -> Step:
    """The step of a denoiser that runs in `dtype`; x and the noise stay float32, learned variances are dropped."""
    arguments = in_dtype(inputs, dtype)

    def step(x: Tensor, t: Tensor) -> Tensor:
        return call(x.to(dtype), t, **arguments, return_dict=False)[0].float()[:, :channels]

    return step


def eager(parts: Parts, dtype: torch.dtype) -> Ready:
    """The model as it comes."""
    return Ready(parts.loop, step_of(cast(parts, dtype), parts.inputs, dtype, parts.task.model.size[1]))


def compiled(parts: Parts, dtype: torch.dtype) -> Ready:
    """Frozen weights, inductor."""
    return as_compiled(parts, cast(parts, dtype), dtype)


def as_compiled(parts: Parts, net: nn.Module, dtype: torch.dtype) -> Ready:
    """The same of a network that is in `dtype` already."""
    call = compiler(parts.device, parts.task.mode)(net)
    return Ready(parts.loop, step_of(call, parts.inputs, dtype, parts.task.model.size[1]))


def optional(module: str, package: str) -> Any:
    """A module that need not be installed. Raises: CannotRun without it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise CannotRun(f"{package} cannot be imported ({error}): pip install {package}") from None


def isa_of(task: Task) -> str:
    """What the row says it ran on."""
    if task.device == "cpu":
        return detect().level
    major, minor = torch.cuda.get_device_capability()
    return f"cuda sm_{major}{minor}"
