"""Learn rounding and steps on a pipeline's denoiser, or on any module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from modiff.api import collect
from modiff.calibration.data import Call
from modiff.calibration.reconstruct import run as _reconstruct
from modiff.calibration.reconstruct.config import ReconstructConfig
from modiff.calibration.reconstruct.layers import full_precision
from modiff.calibration.reconstruct.report import ReconstructionReport
from modiff.errors import ConfigError
from modiff.hosts.blocks import KINDS
from modiff.hosts.networks import modules_of
from modiff.model.attach import attachment_of, required_attachment


def reconstruct(
    target: Any,
    calls: Sequence[Call] | Callable[[int], object],
    config: ReconstructConfig | None = None,
    *,
    component: str | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> ReconstructionReport:
    """Learn how each weight rounds (AdaRound), or static steps, block by block, and fix what is better into the layers.

    Args:
        target: a pipeline, or a module, that `modiff.apply` was called on.
        calls: a calibration set of its denoiser from `modiff.collect`; or `run(i)`, which generates with the seeds of
            trajectory i: one trajectory in full precision is collected then, all steps of it.
        config: what is learned and how long; Q-Diffusion's settings for weights when None.
            `ReconstructConfig.quick_weights()` is for small models on a CPU.
        component: which denoiser, for pipelines with several.
        folder: keeps each finished unit as safetensors; the same call goes on after the last one there.
    Returns: each unit, with its loss on held-out rows before and after.
    Raises: StateError without modulated layers; ConfigError or CalibrationError for what cannot be learned;
        FormatError for a folder of another reconstruction.
    Cost: for each unit, two runs of the network up to it for each call, then `config.iterations` passes of the unit.
    """
    model = _component(target, component)
    config = config or ReconstructConfig()
    if callable(calls):
        required_attachment(model, "reconstruct")
        with full_precision(model):
            pairs = config.learn == "residual_steps"
            calls = collect(target, calls, component=component, pairs=pairs, progress=progress)
    return _reconstruct.reconstruct(model, calls, config, kinds=KINDS, folder=folder, progress=progress)


def _component(target: Any, name: str | None) -> nn.Module:
    modules = modules_of(target)
    if name is None:
        modulated = {n: m for n, m in modules.items() if attachment_of(m) is not None} or modules
        if len(modulated) == 1:
            return next(iter(modulated.values()))
    if name not in modules:
        raise ConfigError(
            f"reconstruct.component: expected one of {', '.join(modules)}, got {name!r}. A calibration set belongs to "
            f"one network. Give component={next(iter(modules))!r}."
        )
    return modules[name]
