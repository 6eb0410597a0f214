"""The variants of the loop benchmark: ours, the honest opponents, and what each needs."""

import dataclasses
import importlib
import inspect
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import modiff
from loop.deepcache import DeepCache
from loop.graphs import Recorded
from loop.models import Inputs, Loop, LoopModel, Step, of_rows, repeated
from loop.recordable import recording_unsupported
from modiff import presets
from modiff.config import ModiffConfig, ModulationConfig, StateDtype
from modiff.kernels.isa import detect
from modiff.model.trajectory import state_bytes
from modiff.nn.fusion import backend

CALIBRATION_SEED = 1_000_000
"""OpenVINO's ranges come from noise that no figure is judged on."""
CALIBRATION_CALLS = 50
GATE_STEPS = 10
GRAPHS = "reduce-overhead"
"""torch.compile's mode on GPUs: inductor's kernels, a whole step launched as one CUDA graph."""
MODES = (GRAPHS, "max-autotune", "max-autotune-no-cudagraphs", "default")
LEAST_ROWS = 17
"""Fewer rows have no integer matmul in cuBLAS."""
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


def fewer_steps(parts: Parts, divisor: int) -> Ready:
    """The best 16/32-bit baseline with a fraction of the steps: what any approximation has to beat."""
    ready = compiled(parts, best_dtype(parts.task))
    loop = parts.loop
    return dataclasses.replace(
        ready, loop=dataclasses.replace(loop, steps=loop.steps // divisor, timed=max(1, loop.timed // divisor))
    )


def torchao_int8(parts: Parts) -> Ready:
    """torchao's dynamic int8 on linear layers, compiled; convolutions stay 16/32-bit.

    Frozen, inductor makes oneDNN's u8 x s8 product of it. Without VNNI that sums pairs in int16, which saturate at 8
    bits; `reduce_range`, 7 bits, is torchao's answer to that.
    """
    config = optional("torchao.quantization", "torchao").Int8DynamicActivationInt8WeightConfig
    if parts.device.type != "cpu" or detect().sums_in_int32:
        return torchao_linear(parts, config())
    if "reduce_range" not in inspect.signature(config).parameters:
        raise CannotRun("this torchao has no reduce_range: its 8-bit sums saturate without VNNI")
    return dataclasses.replace(torchao_linear(parts, config(reduce_range=True)), note="7 bits: no VNNI here")


def torchao_float8(parts: Parts) -> Ready:
    """The same in float8, on GPUs."""
    if parts.device.type == "cpu":
        raise CannotRun("float8 is compared on GPUs only")
    return torchao_linear(
        parts, optional("torchao.quantization", "torchao").Float8DynamicActivationFloat8WeightConfig()
    )


def torchao_linear(parts: Parts, config: object) -> Ready:
    """torchao on linear layers, activations coded at each call, compiled."""
    dtype = best_dtype(parts.task)
    net = cast(parts, dtype)
    wide = None if parts.device.type == "cpu" else layers_of_many_rows(parts, net, dtype)
    chosen = None if wide is None else lambda module, name: name in wide
    optional("torchao.quantization", "torchao").quantize_(net, config, filter_fn=chosen)
    return as_compiled(parts, net, dtype)


def layers_of_many_rows(parts: Parts, net: nn.Module, dtype: torch.dtype) -> set[str]:
    """The linear layers that get LEAST_ROWS rows or more: those of the time step get one for each image."""
    names: set[str] = set()
    hooks = [
        module.register_forward_pre_hook(
            lambda _, call, name=name: names.add(name) if call[0].numel() >= LEAST_ROWS * call[0].shape[-1] else None
        )
        for name, module in net.named_modules()
        if isinstance(module, nn.Linear)
    ]
    parts.loop.run(step_of(net, parts.inputs, dtype, parts.task.model.size[1]), CALIBRATION_SEED, 1)
    for hook in hooks:
        hook.remove()
    return names


def openvino_int8(parts: Parts) -> Ready:
    """OpenVINO with NNCF's post-training int8, U-Nets on CPUs.

    As a convolutional network, NNCF's default, the embedded model's images are 0.5 off, with 12 calls or 50; as a
    transformer (attention in floats, SmoothQuant) 0.14. The rest is float32: with bfloat16 nothing compiles.
    """
    ov, nncf = optional("openvino", "openvino"), optional("nncf", "nncf")
    if not parts.task.model.unet:
        raise CannotRun("OpenVINO int8 is compared on U-Nets only")
    if parts.device.type != "cpu":
        raise CannotRun("OpenVINO runs on the CPU only")
    channels = parts.task.model.size[1]
    net = Positional(parts.net, parts.inputs)
    calls: list[tuple[Tensor, Tensor]] = []

    def recording(x: Tensor, t: Tensor) -> Tensor:
        calls.append((x.clone(), t.clone()))
        return net(x, t).float()[:, :channels]

    parts.loop.run(recording, CALIBRATION_SEED)
    chosen = calls[:: max(1, len(calls) // CALIBRATION_CALLS)]
    data = [{0: x.numpy(), 1: t.numpy()} for x, t in chosen]
    exact = detect().sums_in_int32  # else 7 bits of each weight, as NNCF advises where sums saturate
    overflow = nncf.OverflowFix.DISABLE if exact else nncf.OverflowFix.ENABLE
    graph = nncf.quantize(
        ov.convert_model(net, example_input=calls[0]), nncf.Dataset(data), subset_size=len(data),
        model_type=nncf.ModelType.TRANSFORMER,
        advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=overflow),
    )  # fmt: skip
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    request = ov.Core().compile_model(graph, "CPU", settings)

    def step(x: Tensor, t: Tensor) -> Tensor:
        return torch.from_numpy(request([x.numpy(), t.numpy()])[0]).float()[:, :channels]

    return Ready(parts.loop, step, note="" if exact else "7-bit weights: no VNNI here")


class Positional(nn.Module):
    """A denoiser as a function of (x, t): what a tracer wants."""

    def __init__(self, net: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.net, self.inputs = net, inputs

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(x, t, **self.inputs, return_dict=False)[0]


def deepcache(parts: Parts, interval: int) -> Ready:
    """Whole steps every `interval`, else the shallowest level; compiled like the best baseline."""
    if not parts.task.model.unet:
        raise CannotRun("DeepCache is for U-Nets")
    dtype = best_dtype(parts.task)
    # A CUDA graph writes its outputs to the same place each time: what is kept must be a copy.
    keep = (lambda feature: feature) if parts.device.type == "cpu" else torch.clone
    cache = DeepCache(cast(parts, dtype), interval, compiler(parts.device, parts.task.mode), keep)
    inputs, channels = in_dtype(parts.inputs, dtype), parts.task.model.size[1]

    def step(x: Tensor, t: Tensor) -> Tensor:
        return cache(x.to(dtype), t, inputs).float()[:, :channels]

    def begin() -> AbstractContextManager[None]:
        cache.reset()
        return nullcontext()

    return Ready(parts.loop, step, begin, cache.state_bytes)


def ours(parts: Parts, config: ModiffConfig) -> Ready:
    """modiff on integers."""
    modiff.apply(parts.net, config.on_integers())
    return modulated(parts)


def ours_with_states(parts: Parts, state_dtype: StateDtype) -> Ready:
    """Modulated W8A8 with other states than by default: float16 on GPUs, float32 on CPUs."""
    device = parts.device.type
    if (device == "cpu") != (state_dtype == "float32"):
        raise CannotRun(f"{state_dtype} states are compared on {'GPUs' if device == 'cpu' else 'CPUs'} only: there is "
                        "no loop for them here")  # fmt: skip
    layer = presets.w8a8().layer
    states = dataclasses.replace(layer.modulation or ModulationConfig(), state_dtype=state_dtype)
    return ours(parts, ModiffConfig(layer=dataclasses.replace(layer, modulation=states, execution="integer")))


def modulated(parts: Parts) -> Ready:
    """The loop of a network that carries modiff: one graph, compiled between its layers, in the best dtype there.

    On GPUs its steps are recorded as a CUDA graph, but for the first ones.
    """
    dtype = best_dtype(parts.task)
    net = parts.net.to(dtype).to(memory_format=torch.channels_last)
    call = compiler(parts.device)(net, fullgraph=True, backend=backend)  # its name is known only once installed
    step = step_of(call, parts.inputs, dtype, parts.task.model.size[1])
    if parts.device.type == "cpu":
        return Ready(parts.loop, step, lambda: modiff.trajectory(net), lambda: state_bytes(net))
    if unsupported := recording_unsupported(net):
        raise CannotRun(f"no CUDA graph can hold a step: {unsupported}")
    recorded = Recorded(net, step)
    return Ready(parts.loop, recorded, recorded.begin, recorded.kept.bytes_held)


def gated(parts: Parts) -> Ready:
    """Each layer in the fastest of floats, plain and modulated W8A8 that meets the error asked for.

    Where no layer pays, modiff leaves the model alone, and it runs as the best baseline.
    """
    dtype = best_dtype(parts.task)
    step = step_of(cast(parts, dtype), parts.inputs, dtype, parts.task.model.size[1])
    few = min(GATE_STEPS, parts.loop.timed)
    choices = modiff.autotune(parts.net, run=lambda: parts.loop.run(step, CALIBRATION_SEED, few))
    note = str(choices).partition(";")[0]
    if not choices.pays:
        return dataclasses.replace(compiled(parts, best_dtype(parts.task)), note=note)
    modiff.apply(parts.net, choices.config)
    return dataclasses.replace(modulated(parts), note=note)


def accelerated(parts: Parts) -> Ready:
    """`modiff.accelerate` with the error that it allows when it is not told, from noise that no figure is judged on.

    Where integers do not pay, it leaves the network as it was, which runs as the best baseline.
    """
    step = step_of(parts.net, parts.inputs, torch.float32, parts.task.model.size[1])
    result = modiff.accelerate(parts.net, example=lambda: parts.loop.run(step, CALIBRATION_SEED), progress=False)
    note = str(result).partition("\n")[0]
    if not result.accelerated:
        return dataclasses.replace(compiled(parts, torch.float32), note=note)
    return Ready(parts.loop, step, lambda: modiff.trajectory(parts.net), lambda: state_bytes(parts.net), note)


def optional(module: str, package: str) -> Any:
    """A module that need not be installed. Raises: CannotRun without it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise CannotRun(f"{package} cannot be imported ({error}): pip install {package}") from None


VARIANTS: dict[str, Callable[[Parts], Ready]] = {
    "fp32-eager": partial(eager, dtype=torch.float32),
    "fp32-compiled": partial(compiled, dtype=torch.float32),
    "bf16-eager": partial(eager, dtype=torch.bfloat16),
    "bf16-compiled": partial(compiled, dtype=torch.bfloat16),
    "torchao-int8": torchao_int8,
    "torchao-float8": torchao_float8,
    "openvino-int8": openvino_int8,
    "deepcache-2": partial(deepcache, interval=2),
    "deepcache-3": partial(deepcache, interval=3),
    "fewer-steps-2": partial(fewer_steps, divisor=2),
    "plain-w8a8": partial(ours, config=presets.plain(8, 8)),
    "modulated-w8a8": partial(ours, config=presets.w8a8()),
    "modulated-w8a8-fp16": partial(ours_with_states, state_dtype="float16"),
    "modulated-w8a8-float32": partial(ours_with_states, state_dtype="float32"),
    "modulated-w8a7": partial(ours, config=presets.modulated(8, 7)),  # the most that sums exactly without VNNI
    "modulated-w8a4": partial(ours, config=presets.w8a4()),
    "modulated-w4a4": partial(ours, config=presets.w4a4()),
    "accelerate": accelerated,
    "gated": gated,
}
REFERENCE = "fp32-eager"


def prepare(task: Task) -> Ready:
    """The variant, built and warmed up: everything is compiled and allocated once. Raises: CannotRun."""
    if task.variant not in VARIANTS:
        raise CannotRun(f"no variant is called {task.variant}")
    if task.threads is not None:
        torch.set_num_threads(task.threads)
    if task.device != "cpu" and not torch.cuda.is_available():
        raise CannotRun("no CUDA device")
    torch.backends.cudnn.allow_tf32 = False  # float32 is what errors are measured against
    return VARIANTS[task.variant](parts_of(task))


def isa_of(task: Task) -> str:
    """What the row says it ran on."""
    if task.device == "cpu":
        return detect().level
    major, minor = torch.cuda.get_device_capability()
    return f"cuda sm_{major}{minor}"
