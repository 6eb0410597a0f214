"""What modiff is compared with in the loop benchmark: fewer steps, caches of steps, and other libraries' int8."""

import dataclasses
import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from diffusers import CacheMixin, DPMSolverMultistepScheduler
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
from torch import Tensor, nn

from loop.deepcache import DeepCache
from loop.models import Inputs
from loop.task import (
    CALIBRATION_SEED,
    CannotRun,
    Parts,
    Ready,
    as_compiled,
    best_dtype,
    cast,
    compiled,
    compiler,
    in_dtype,
    optional,
    step_of,
)
from modiff.kernels.isa import detect

CALIBRATION_CALLS = 50
LEAST_ROWS = 17
"""Fewer rows have no integer matmul in cuBLAS."""


def fewer_steps(parts: Parts, divisor: int) -> Ready:
    """The best 16/32-bit baseline with a fraction of the steps: what any approximation has to beat."""
    ready = compiled(parts, best_dtype(parts.task))
    loop = parts.loop
    return dataclasses.replace(
        ready, loop=dataclasses.replace(loop, steps=loop.steps // divisor, timed=max(1, loop.timed // divisor))
    )


def dpm_solver(parts: Parts, divisor: int) -> Ready:
    """DPM-Solver++ 2M, the sampler that most take for few steps. Its images are other solutions than DDIM's."""
    ready, scheduler = fewer_steps(parts, divisor), parts.loop.scheduler
    solver = DPMSolverMultistepScheduler.from_config(scheduler.config)
    loop = dataclasses.replace(ready.loop, scheduler=solver)

    def begin() -> AbstractContextManager[None]:
        solver.set_timesteps(loop.steps)  # forgets the last loop's outputs
        return nullcontext()

    return dataclasses.replace(ready, loop=loop, begin=begin, note="another sampler: the distance is to DDIM")


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


def first_block_cache(parts: Parts) -> Ready:
    """diffusers' FirstBlockCache: blocks after the first run where its output changed by more than the threshold."""
    if parts.task.model.unet:
        raise CannotRun("FirstBlockCache is for transformers")
    dtype, config = best_dtype(parts.task), FirstBlockCacheConfig()
    net: Any = cast(parts, dtype)
    apply_first_block_cache(net, config)

    def begin() -> AbstractContextManager[None]:
        CacheMixin._reset_stateful_cache(net)
        return CacheMixin.cache_context(net, "loop")

    return dataclasses.replace(as_compiled(parts, net, dtype), begin=begin, note=f"threshold {config.threshold}")
