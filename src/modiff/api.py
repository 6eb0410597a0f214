"""The public verbs, on a pipeline or on any module."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from modiff.config import ModiffConfig, ModulationConfig
from modiff.errors import ConfigError
from modiff.hosts import save as _save
from modiff.hosts.contexts import cache_contexts, unfollow_cache_context
from modiff.hosts.networks import modules_of
from modiff.hosts.save import is_diffusers_model
from modiff.hosts.unet import shortcut_splits
from modiff.model import apply as _apply
from modiff.model import calibrate as _calibrate
from modiff.model import pack as _pack
from modiff.model import remove as _remove
from modiff.model import trajectory as _trajectory
from modiff.model import tune as _tune
from modiff.model.attach import attachment_of, required_attachment
from modiff.model.calibrate import MakeObserver, ObserverName
from modiff.model.report import Report
from modiff.model.select import layer_names


def _modulated(target: Any, verb: str) -> list[nn.Module]:
    """The networks of a target that carry modiff. Raises: StateError if none does."""
    modules = list(modules_of(target).values())
    found = [m for m in modules if attachment_of(m) is not None]
    if not found:
        required_attachment(modules[0], verb)
    return found


def apply(target: Any, config: ModiffConfig | None = None) -> Report:
    """Modulate a pipeline's denoisers, or a module, in place; `remove` undoes it bit for bit.

    On a pipeline every call is a trajectory of its own. A module alone runs inside `with modiff.trajectory(module):`.
    `save_pretrained` of a diffusers model or pipeline writes packed integers from now on; the floats stay in memory.

    Args:
        config: from `modiff.presets`; W8A8 when None.
    Returns: each layer taken or left, and why.
    Raises: StateError if modiff is on it already; ConfigError if the config takes no layer. Nothing is changed then.
    """
    modules = modules_of(target)
    config = config or ModiffConfig()
    known = layer_names(modules.values())
    done: list[nn.Module] = []
    report = Report(())
    try:
        for module in modules.values():
            report += _apply.apply(module, config, splits=shortcut_splits(module), known=known)
            done.append(module)
    except Exception:
        for module in done:
            _remove.remove(module)
        raise
    if any(is_diffusers_model(module) for module in done):
        from modiff.hosts.quantizer import offer_quantizer

        for module in done:
            offer_quantizer(module)
    if not isinstance(target, nn.Module):
        from modiff.hosts import diffusers

        diffusers.attach(target)
    return report


def remove(target: Any) -> None:
    """Undo `apply`: the same modules, parameters and bits as before.

    Raises: StateError if there is nothing to undo, or no way back: after `pack` or `load`, or where another library
        wrapped the layers since. Nothing is changed then.
    """
    modules = modules_of(target)
    for module in modules.values():
        _remove.check_removable(module)
    for module in modules.values():
        _remove.remove(module)
        unfollow_cache_context(module)
    if any(is_diffusers_model(module) for module in modules.values()):
        from modiff.hosts.quantizer import withdraw_quantizer

        for module in modules.values():
            withdraw_quantizer(module)
    if not isinstance(target, nn.Module):
        from modiff.hosts import diffusers

        diffusers.detach(target)


def pack(target: Any) -> None:
    """Keep integer codes and float32 scales in the place of float weights: half a byte a weight at 4 bits or fewer.

    Outputs stay the same bits. There is no way back: `remove` is refused afterwards. diffusers then treats its models
    as quantized: `.half()` is refused.
    Raises: StateError without modulated layers, inside a trajectory, or if weights changed after their rounding was
        learned. Nothing is changed then.
    """
    modules = _modulated(target, "pack")
    for module in modules:
        _pack.check_packable(module)
    for module in modules:
        _pack.pack(module)
    if any(is_diffusers_model(module) for module in modules):
        from modiff.hosts.quantizer import attach_quantizer

        for module in modules:
            attach_quantizer(module)


def save(target: Any, folder: str | Path, *, max_shard_size: int | str = "5GB") -> None:
    """Write a modulated pipeline or module as plain safetensors and JSON: packed weights, float32 scales, settings.

    The target is not changed and needs no `pack`. A pipeline or a model of diffusers is written as diffusers writes it,
    so its `from_pretrained` reads the folder too; other modules as config.json and model.safetensors.

    Args:
        folder: new or empty; it appears when all of it is on disk.
        max_shard_size: bytes, or a text such as "200MB"; larger weights go to several files.
    Raises: StateError without modulated layers, or with a LoRA loaded; FormatError if the folder holds files; OSError.
    """
    _save.save(target, _modulated(target, "save"), folder, max_shard_size)


def load(
    folder: str | Path, *, into: nn.Module | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """Read what `save` wrote: the same codes and scales, the same outputs bit for bit.

    Args:
        into: a module of the class that was saved, in full precision, which is changed in place; for modules that are
            not of diffusers.
        device: "cpu", "cuda" or "cuda:1".
        dtype: of what is not quantized, for pipelines and models of diffusers; scales stay float32.
    Returns: a pipeline (each call is a trajectory), a model of diffusers (begins trajectories by its time steps), or
        `into` (runs inside `modiff.trajectory`); packed.
    Raises: FormatError in one line for a folder that is missing, damaged, hostile or of another version, before
        anything large is allocated; ConfigError if `into` is needed and missing, or not needed and given.
    """
    return _save.load(folder, into, device, dtype)


@contextmanager
def trajectory(target: Any) -> Iterator[None]:
    """One generation of a loop of one's own: states start empty and are freed at the end, also when the body raises.

    Raises: StateError without modulated layers, or inside another trajectory of the same model.
    """
    if isinstance(target, nn.Module):
        with _trajectory.trajectory(target):
            yield
        return
    _modulated(target, "trajectory")
    from modiff.hosts import diffusers

    with diffusers.pipeline_trajectory(target):
        yield


@contextmanager
def context(module: nn.Module, name: str) -> Iterator[None]:
    """Evaluations in the body have states of their own, e.g. "cond" and "uncond" of guidance in two calls."""
    with _trajectory.context(module, name):
        yield


def calibrate(
    target: Any, forward_loop: Callable[[], object], *, observer: ObserverName | MakeObserver = "minmax"
) -> None:
    """Measure the scales of layers with `dynamic=False` on what `forward_loop` runs, and freeze them.

    Args:
        forward_loop: runs whole trajectories, for example `lambda: pipe(...)`.
        observer: how values become a range: "minmax", "moving_average", "percentile", "mse", "l1", "cosine", "kl", or
            what makes an observer for an axis, `lambda axis: MSEObserver(axis, trials=100)`.
    Raises: StateError without modulated layers; ConfigError for an observer that does not exist; CalibrationError if no
        layer has static scales, or one never ran.
    """
    _calibrate.calibrate(_modulated(target, "calibrate"), forward_loop, observer=observer)


def tune(
    target: Any,
    bits: int,
    *,
    config: ModiffConfig | None = None,
    weight_bits: int | None = 8,
    steps: int = 50,
    num_images: int = 4,
    seed: int = 0,
    granularity: Literal["model", "layer"] = "model",
    run: Callable[[], object] | None = None,
) -> ModiffConfig:
    """Clip ratio, predictor, gain and rotation for a model at `bits` activation bits, from a few short trajectories.

    Args:
        config: selection and other settings to keep; its bit widths are replaced.
        steps, num_images, seed: of the trajectory of an unconditional pipeline; use the steps you will sample with.
        granularity: "model" for one setting, "layer" for one per layer.
        run: runs one trajectory; needed for anything but an unconditional pipeline.
    Returns: a config for `modiff.apply`. The target is not changed.
    Raises: ConfigError if `run` is needed and missing; StateError if modiff is on the target already.
    Cost: a full-precision trajectory with a pass over each input per candidate, then a few modulated trajectories.
    """
    base = config or ModiffConfig()
    layer = dataclasses.replace(
        base.layer,
        weight=dataclasses.replace(base.layer.weight, bits=weight_bits),
        activation=dataclasses.replace(base.layer.activation, bits=bits),
        modulation=dataclasses.replace(base.layer.modulation or ModulationConfig(), predictor="hold"),
    )
    base = dataclasses.replace(base, layer=layer)
    modules = list(modules_of(target).values())
    if run is None:
        if isinstance(target, nn.Module):
            raise ConfigError(
                "tune: expected run=, a function that runs one trajectory, got none. A module alone does not say how "
                "it is sampled. Give run=lambda: ..."
            )
        from modiff.hosts import diffusers

        run = diffusers.unconditional_run(target, steps, num_images, seed)
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(cache_contexts(module))
        splits = [shortcut_splits(module) for module in modules]
        return _tune.tune(modules, run, base, granularity=granularity, splits=splits)
