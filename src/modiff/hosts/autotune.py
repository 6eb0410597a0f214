"""Autotune on pipelines, and the file where it keeps what it measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn

from modiff import presets
from modiff.config import ModiffConfig
from modiff.errors import ConfigError, FormatError
from modiff.files import check_writable, write_json
from modiff.hosts.contexts import cache_contexts
from modiff.hosts.networks import modules_of
from modiff.hosts.unet import shortcut_splits
from modiff.kernels.isa import machine
from modiff.model import autotune as _autotune
from modiff.model.autotune import AutotuneResult
from modiff.model.layer_times import Profile


def autotune(
    target: Any,
    config: ModiffConfig | None = None,
    *,
    tolerance: float = 0.01,
    steps: int = 10,
    num_images: int = 1,
    seed: int = 0,
    run: Callable[[], object] | None = None,
    profile: str | Path | None = None,
) -> AutotuneResult:
    """For each layer the fastest of floats, plain integers and modulated integers that is exact enough.

        found = modiff.autotune(pipe, num_images=4)
        if found.pays:
            modiff.apply(pipe, found.config)

    Args:
        config: bits and selection, modulated, without overrides; W8A8 when None.
        tolerance: the largest relative error that coding the input of a layer may make.
        steps, num_images, seed: of the trajectory of an unconditional pipeline; use the batch you will sample with.
        run: runs one trajectory; needed for anything but an unconditional pipeline.
        profile: JSON file of the times of layers, by machine. The same file gives the same choice; what it lacks is
            measured and added.
    Returns: the choice of each layer with its reason, and a config for `modiff.apply`. The target is not changed.
    Raises: ConfigError if `run` is needed and missing; StateError if modiff is on the target already; FormatError for
        a profile that is none.
    Cost: a full-precision trajectory, and some twenty calls of each kind of layer that the profile lacks.
    """
    modules = list(modules_of(target).values())
    if run is None:
        run = _unconditional(target, steps, num_images, seed)
    known = {} if profile is None else _read(Path(profile))
    here = Profile.from_dict(known[machine()]) if machine() in known else Profile()
    if profile is not None:
        check_writable(profile)
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(cache_contexts(module))
        splits = [shortcut_splits(module) for module in modules]
        found = _autotune.autotune(
            modules, run, config or presets.w8a8(), tolerance=tolerance, profile=here, splits=splits
        )
    if profile is not None:
        write_json(profile, known | {machine(): here.to_dict()})
    return found


def _unconditional(target: Any, steps: int, num_images: int, seed: int) -> Callable[[], object]:
    if isinstance(target, nn.Module):
        raise ConfigError(
            "autotune: expected run=, a function that runs one trajectory, got none. A module alone does not "
            "say how it is "
            "sampled. Give run=lambda: ..."
        )
    from modiff.hosts import diffusers  # imported late: modules need no diffusers

    return diffusers.unconditional_run(target, steps, num_images, seed)


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise FormatError(f"{path}: expected a profile that modiff wrote, got something else. Delete it: it is "
                          "measured again.")  # fmt: skip
    return values
