"""Calibration data: what a network was called with along its trajectories, in memory or in a folder of shards.

A folder holds `calibration.json`, the settings, and `trajectory-00000-000.safetensors`, ...: the shards of each
trajectory, the last of which says so; a trajectory without it was interrupted and is collected again. Tensors are
stored as tensors, everything else as JSON in the header of the file. No pickle.
"""

import functools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor, nn

from modiff.errors import CalibrationError, FormatError
from modiff.files import ResumableFolder, read_json, reading, write_tensors

FORMAT, VERSION, SETTINGS = "modiff calibration set", 1, "calibration.json"
_FIRST = re.compile(r"trajectory-(\d{5,})-000\.safetensors")
_SHARD = ("a shard of a calibration set", "Remove it and collect again.")


@dataclass(frozen=True, eq=False)
class Call:
    """One evaluation of the network.

    args, kwargs: its inputs, tensors on the CPU; both branches of guidance in one batch, or in two calls of different
        `context`. step: from 0, the noisiest. rows: the samples of the batch that were kept; empty for all.
    previous: the evaluation of the same rows and context one step before, for residuals; None at step 0 or if not kept.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    step: int
    timestep: float | None
    context: str = "default"
    trajectory: int = 0
    rows: tuple[int, ...] = ()
    previous: "Call | None" = None

    def evaluate(self, model: nn.Module) -> Any:
        """What `model` returns for these inputs, moved to the device of its parameters."""
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        args, kwargs = map_tensors((self.args, self.kwargs), lambda t: t.to(device))
        return model(*args, **kwargs)

    def tensors(self) -> list[Tensor]:
        """Every tensor of the call and of the previous one."""
        return tensors_of((self.args, self.kwargs)) + ([] if self.previous is None else self.previous.tensors())


def map_tensors(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`tree` (nested tuples, lists and dictionaries) with every tensor replaced by `change(tensor)`."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {key: map_tensors(value, change) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return type(tree)(map_tensors(value, change) for value in tree)
    return tree


def tensors_of(tree: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists and dictionaries, in order."""
    tensors: list[Tensor] = []
    map_tensors(tree, lambda t: tensors.append(t) or t)
    return tensors


class LazyCalls(Sequence[Call]):
    """Calls made from `items`, each when it is needed: `LazyCalls(indices, calls.__getitem__)`."""

    def __init__(self, items: Sequence[Any], read: Callable[[Any], Call]) -> None:
        self._items, self._read = items, read

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        item = self._items[index]
        return LazyCalls(item, self._read) if isinstance(index, slice) else self._read(item)


def calls_with_previous(verb: str, calls: Sequence[Call]) -> Sequence[Call]:
    """The calls that hold the one before them. Raises: CalibrationError if there are none."""
    pairs = [i for i in range(len(calls)) if calls[i].previous is not None]
    if not pairs:
        raise CalibrationError(f"{verb}: expected calls with the one before each, got none among {len(calls)}. A "
                               "residual is the change between two steps. Collect with pairs=True.")  # fmt: skip
    return calls if len(pairs) == len(calls) else LazyCalls(pairs, calls.__getitem__)


def largest_step(calls: Sequence[Call]) -> float | None:
    """The largest |timestep - timestep before| of calls with the one before each; None without timesteps."""
    pairs = ((call.timestep, call.previous.timestep) for call in calls if call.previous is not None)
    return max((abs(now - before) for now, before in pairs if now is not None and before is not None), default=None)


class CalibrationSet(LazyCalls):
    """Calls of one network, by trajectory and then in their order; read from disk one at a time if it lies in a folder.

    settings: how they were collected; plain JSON values.
    """

    def __init__(self, calls: Sequence[Call], settings: dict[str, Any] | None = None) -> None:
        super().__init__(range(len(calls)), calls.__getitem__)
        self.settings: dict[str, Any] = settings or {}

    def save(self, folder: str | Path) -> None:
        """Write the set to a folder, a file for each trajectory. Raises: ConfigError if it holds another set."""
        trajectories: dict[int, list[Call]] = {}
        for call in self:
            trajectories.setdefault(call.trajectory, []).append(call)
        with shard_folder(folder, self.settings) as shards:
            for trajectory, calls in trajectories.items():
                write_shard(shards.path, trajectory, 0, calls, last=True)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """The set in `folder`; tensors are read when a call is needed.

        Raises: FormatError if the folder, its settings or a shard is missing, damaged or of another version.
        """
        folder = Path(folder)
        advice = "Give a folder written by CalibrationSet.save."
        settings = read_json(folder / SETTINGS, "the settings of a calibration set", advice)
        version = settings.pop("format_version", None)
        if version != VERSION:
            raise FormatError(f"{folder / SETTINGS}: expected format_version {VERSION}, got {version!r}. Another "
                              "version of modiff wrote it. Collect the set again.")  # fmt: skip
        trajectories = complete_trajectories(folder)
        expected = settings.get("trajectories", len(trajectories))
        if len(trajectories) != expected:
            raise FormatError(
                f"{folder}: expected {expected} trajectories, got {len(trajectories)} complete ones. Collecting was "
                "interrupted, or files are missing. Collect again into the same folder: it goes on."
            )
        return cls(LazyCalls([record for records in trajectories.values() for record in records], _read_call), settings)


def shard_folder(folder: str | Path, settings: dict[str, Any]) -> ResumableFolder:
    """The folder of a set with these settings, to be entered with `with`."""
    job = {"format_version": VERSION} | settings
    return ResumableFolder(folder, job, record=SETTINGS, items="trajectory-*.safetensors")


def write_shard(folder: Path, trajectory: int, number: int, calls: Iterable[Call], *, last: bool) -> None:
    """Write calls of a trajectory, atomically; a tensor that several calls hold is stored once.

    Raises: CalibrationError for an argument that is neither a tensor, a plain value, nor a container of them.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}

    def name_of(tensor: Tensor) -> str:
        if id(tensor) not in names:
            names[id(tensor)] = f"t{len(names)}"
            tensors[names[id(tensor)]] = tensor.contiguous().clone()
        return names[id(tensor)]

    kept = list(calls)  # alive while ids are names
    fields = [_encode(call, name_of)["call"] for call in kept]
    facts = {"format": FORMAT, "format_version": str(VERSION), "last": str(last), "calls": json.dumps(fields)}
    write_tensors(_shard_path(folder, trajectory, number), tensors, facts)


def complete_trajectories(folder: Path) -> dict[int, list[tuple[Path, dict[str, Any]]]]:
    """Trajectories whose shards are all there, with their encoded calls, each with its file, in order.

    Raises: FormatError for a shard that is damaged.
    """
    first = sorted(int(match[1]) for path in folder.iterdir() if (match := _FIRST.fullmatch(path.name)))
    return {trajectory: records for trajectory in first if (records := _records(folder, trajectory)) is not None}


def _shard_path(folder: Path, trajectory: int, number: int) -> Path:
    return folder / f"trajectory-{trajectory:05d}-{number:03d}.safetensors"


def _records(folder: Path, trajectory: int) -> list[tuple[Path, dict[str, Any]]] | None:
    records: list[tuple[Path, dict[str, Any]]] = []
    number = 0
    while (path := _shard_path(folder, trajectory, number)).exists():
        with reading(path, *_SHARD):
            with safe_open(path, "pt") as file:
                facts = file.metadata() or {}
            if facts.get("format") != FORMAT or facts.get("format_version") != str(VERSION):
                raise ValueError(f"a file of format {facts.get('format')!r}")
            calls = json.loads(facts["calls"])
            if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
                raise TypeError("calls that are no list of objects")
        records += [(path, call) for call in calls]
        if facts.get("last") == "True":
            return records
        number += 1
    return None


def _read_call(record: tuple[Path, dict[str, Any]]) -> Call:
    path, encoded = record
    with reading(path, *_SHARD), safe_open(path, "pt") as file:
        return _decode({"call": encoded}, functools.cache(file.get_tensor))


def _encode(value: Any, name_of: Callable[[Tensor], str]) -> Any:
    if isinstance(value, Tensor):
        return {"tensor": name_of(value)}
    if isinstance(value, Call):
        return {"call": {name: _encode(item, name_of) for name, item in vars(value).items()}}
    if isinstance(value, dict):
        return {"dict": [[_plain(key), _encode(item, name_of)] for key, item in value.items()]}
    if isinstance(value, (tuple, list)):
        return {type(value).__name__: [_encode(item, name_of) for item in value]}
    return _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    raise CalibrationError(
        f"calibration set: expected tensors, numbers, strings and containers of them, got {type(value).__name__}. "
        "Only these are saved without pickle. Call the network with plain arguments."
    )


def _decode(value: Any, tensor: Callable[[str], Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensor(content)
    if kind == "call":
        return Call(**{name: _decode(item, tensor) for name, item in content.items()})
    if kind == "dict":
        return {key: _decode(item, tensor) for key, item in content}
    return {"tuple": tuple, "list": list}[kind](_decode(item, tensor) for item in content)
