"""AccuQuant's finished parts in a folder: the sampler's tables, and each group's scales and where it arrived."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from modiff.calibration.reconstruct.config import UnitReport
from modiff.calibration.reconstruct.learn import Learned, scale_tensors, segments_of
from modiff.calibration.reconstruct.store import load_unit, save_unit
from modiff.config import JsonConfig
from modiff.core.affine import QParams
from modiff.errors import FormatError
from modiff.files import write_atomically
from modiff.methods.sampler_steps import sampler_tables, with_tables

SAMPLER = "sampler.safetensors"
FACTS = {"format": "modiff sampler tables", "version": "1"}
STATE, STEPS = "state", "steps"


@dataclass(frozen=True)
class GroupResult:
    """What one group of steps came to.

    steps: first and last index. before, after: the error at its end, with calibrated and with kept scales.
    scales: of each layer whose scales are kept; empty where the calibrated ones stay. states: where the quantized
    trajectories arrived.
    """

    steps: tuple[int, int]
    before: float
    after: float
    scales: dict[str, tuple[QParams, ...]]
    states: list[Tensor]


def load_group(path: Path) -> GroupResult:
    """A finished group. Raises: FormatError if the file is damaged."""
    learned, report = load_unit(path)
    states = [learned[f"{STATE}.{i}"] for i in range(sum(key.startswith(f"{STATE}.") for key in learned))]
    scales = {name: tuple(qparams for _, qparams in segments_of(learned, name)) for name in report.layers}
    first, last = learned[STEPS].tolist()
    return GroupResult((first, last), report.before, report.after, scales, states)


def save_group(path: Path, group: GroupResult) -> None:
    """Keep a finished group. Raises: OSError."""
    tensors: Learned = {f"{STATE}.{i}": state.cpu() for i, state in enumerate(group.states)}
    tensors[STEPS] = torch.tensor(group.steps)
    for name, scales in group.scales.items():
        tensors |= scale_tensors(name, scales)
    reason = "better at the end of the group" if group.scales else "no better than the calibrated scales"
    report = UnitReport("group", "steps", tuple(group.scales), group.before, group.after, bool(group.scales), 0, reason)
    save_unit(path, tensors, report)


def noting_sampler(run: Callable[[int], object], scheduler: Any, folder: Path | None) -> Callable[[int], object]:
    """`run`, which also keeps the sampler's tables: a trajectory that is read from the folder does not set them."""
    if folder is None:
        return run

    def noted(index: int) -> object:
        result = run(index)
        if not (folder / SAMPLER).exists():
            content = save(sampler_tables(scheduler), metadata=FACTS)
            write_atomically(folder / SAMPLER, lambda file: file.write(content))
        return result

    return noted


def sampler_as_recorded(scheduler: Any, folder: Path | None) -> Any:
    """The scheduler as it was while the trajectories ran. Raises: FormatError if the folder's tables are damaged."""
    if folder is None:
        return with_tables(scheduler, sampler_tables(scheduler))
    path = folder / SAMPLER
    try:
        with safe_open(path, "pt") as file:
            known = file.metadata() == FACTS
            tables = {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, SafetensorError) as error:
        raise FormatError(
            f"{path}: expected the tables of a sampler, got {type(error).__name__}: {error}. The file is damaged or "
            "missing. Delete the folder: its parts are made again."
        ) from error
    if not known:
        raise FormatError(f"{path}: expected the tables of a sampler of this version, got others. Nothing says what "
                          "they mean. Delete the folder: its parts are made again.")  # fmt: skip
    return with_tables(scheduler, tables)


def settings_of(config: JsonConfig, scheduler: Any, guidance_scale: float | None) -> dict[str, Any]:
    """What decides the scales beside weights and calls, for JSON."""
    sampler = [type(scheduler).__name__, repr(sorted(scheduler.config.items()))]
    tables = {name: table.tolist() for name, table in sampler_tables(scheduler).items()}
    return {"config": config.to_dict(), "sampler": sampler, "tables": tables, "guidance_scale": guidance_scale}
