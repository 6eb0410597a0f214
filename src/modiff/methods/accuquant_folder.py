"""AccuQuant's finished parts in a folder: the sampler's tables, and each group's scales and where it arrived."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from modiff.calibration.data import Call
from modiff.calibration.reconstruct.report import UnitReport
from modiff.calibration.reconstruct.store import UnitStore, digest_of
from modiff.calibration.reconstruct.unit import Found, parts_of
from modiff.config import JsonConfig
from modiff.core.affine import QParams
from modiff.errors import FormatError
from modiff.files import write_atomically
from modiff.methods.sampler_steps import sampler_tables, with_tables

SAMPLER = "sampler.safetensors"
FACTS = {"format": "modiff sampler tables", "version": "1"}
STATE = "state"


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


class GroupStore:
    """The groups of one job in a folder, one safetensors file each, written whole or not at all.

    Args:
        folder: made when it is missing; None keeps nothing.
        model, calls, settings: what decides the scales.
    Raises: OSError if the folder cannot be made.
    Cost: with a folder, one pass over the weights and the calls.
    """

    def __init__(self, folder: Path | None, model: nn.Module, calls: Sequence[Call], settings: dict[str, Any]) -> None:
        weights = (*model.parameters(), *model.buffers())
        self._units = UnitStore(folder, "" if folder is None else digest_of(settings, weights, calls))

    def load(self, index: int) -> GroupResult | None:
        """A finished group, None if it is not there. Raises: FormatError if it is damaged or another job's."""
        stored = self._units.load(index, "group")
        if stored is None:
            return None
        found, report = stored
        states = [found[f"{STATE}.{i}"] for i in range(sum(key.startswith(f"{STATE}.") for key in found))]
        scales = {name: tuple(qparams for _, qparams in parts_of(found, name)) for name in report.layers}
        first, last = json.loads(report.reason)
        return GroupResult((first, last), report.before, report.after, scales, states)

    def save(self, index: int, group: GroupResult) -> None:
        """Keep a finished group. Raises: OSError."""
        tensors: Found = {f"{STATE}.{i}": state.cpu() for i, state in enumerate(group.states)}
        for name, parts in group.scales.items():
            for i, (scale, zero_point) in enumerate(parts):
                tensors[f"{name}.{i}.scale"] = scale.cpu()
                if zero_point is not None:
                    tensors[f"{name}.{i}.zero_point"] = zero_point.cpu().clone()
        report = UnitReport("group", "steps", tuple(group.scales), group.before, group.after, bool(group.scales), 0,
                            json.dumps(group.steps))  # fmt: skip
        self._units.save(index, tensors, report)


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
