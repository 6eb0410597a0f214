"""Gather calibration data of a pipeline's denoiser, or of any module."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn

from modiff.calibration import collect as _collect
from modiff.calibration.data import CalibrationSet
from modiff.calibration.timesteps import StepSampler
from modiff.errors import ConfigError
from modiff.hosts.contexts import cache_contexts
from modiff.hosts.networks import modules_of


def collect(
    target: Any,
    run: Callable[[int], object],
    *,
    component: str | None = None,
    trajectories: int = 1,
    batch: int | None = None,
    steps: int | None = None,
    sampler: StepSampler | None = None,
    pairs: bool = False,
    seed: int = 0,
    folder: str | Path | None = None,
    memory_mib: float = 1024.0,
    progress: bool = True,
) -> CalibrationSet:
    """Run trajectories and keep what the sampler chooses of the denoiser's inputs, full-precision or quantized.

    Args:
        target: a pipeline, or a module that `run` evaluates; with modulated layers, the quantized states are kept.
        run: `run(i)` generates with seeds of trajectory i, for example
            `lambda i: pipe(batch_size=8, generator=torch.Generator().manual_seed(i), num_inference_steps=50)`.
        component: which denoiser, for pipelines with several.
        batch, steps, sampler, pairs, seed, folder, memory_mib: as in `modiff.calibration.collect.collect`:
        images in a run,
            evaluations in a run, which steps of which images, the evaluation before as well, and where and how much.
    Returns: calls of the denoiser; both branches of guidance, batched or in contexts of their own.
    Raises: ConfigError for settings that do not fit; CalibrationError if trajectories are not what they say.
    Cost: the trajectories, and a copy of what is kept.
    """
    model = _component(target, component)
    with ExitStack() as stack:
        if "cache_context" not in model.__dict__:  # a modulated pipeline follows its contexts already
            stack.enter_context(cache_contexts(model))
        return _collect.collect(
            model,
            run,
            trajectories=trajectories,
            batch=batch,
            steps=steps,
            sampler=sampler,
            pairs=pairs,
            seed=seed,
            folder=folder,
            memory_mib=memory_mib,
            progress=progress,
        )


def _component(target: Any, name: str | None) -> nn.Module:
    modules = modules_of(target)
    if name is None and len(modules) == 1:
        return next(iter(modules.values()))
    if name not in modules:
        raise ConfigError(
            f"collect.component: expected one of {', '.join(modules)}, got {name!r}. A set belongs to one network. "
            f"Give component={next(iter(modules))!r}."
        )
    return modules[name]
