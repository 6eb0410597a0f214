"""The variants of the loop benchmark by their names, and ours: what each needs, and what it leaves out."""

import dataclasses
from collections.abc import Callable
from functools import partial

import torch

import modiff
from loop.graphs import Recorded
from loop.opponents import (
    deepcache,
    dpm_solver,
    fewer_steps,
    first_block_cache,
    openvino_int8,
    torchao_float8,
    torchao_int8,
)
from loop.recordable import recording_unsupported
from loop.task import (
    CALIBRATION_SEED,
    GRAPHS,
    CannotRun,
    Parts,
    Ready,
    Task,
    best_dtype,
    cast,
    compiled,
    compiler,
    eager,
    parts_of,
    step_of,
)
from modiff import presets
from modiff.config import ModiffConfig, ModulationConfig, StateDtype
from modiff.model.trajectory import state_bytes
from modiff.nn.fusion import backend

GATE_STEPS = 10
MODES = (GRAPHS, "max-autotune", "max-autotune-no-cudagraphs", "default")


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
    "dpm-solver-2": partial(dpm_solver, divisor=2),
    "first-block-cache": first_block_cache,
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
