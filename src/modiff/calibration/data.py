"""Calibration data: what a network was called with along its trajectories, in memory or in a folder of shards."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, overload

import torch
from torch import Tensor, nn

from modiff.calibration import shards as shards
from modiff.errors import FormatError


@dataclass(frozen=True, eq=False)
class Call:
    """One evaluation of the network: its inputs as they came, and where in the trajectory it stood.

    args, kwargs: tensors on the CPU, batched as they came; both branches of guidance lie in one batch, or in two calls
        of different `context`. step: from 0, the noisiest. timestep: what the network was given, None if it takes none.
    rows: the samples of the trajectory's batch that were kept; empty for all.
    previous: the evaluation of the same rows and context one step before, for residuals; None at step 0 or if not kept.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    step: int
    timestep: float | None
    context: str = "default"
    trajectory: int = 0
    rows: tuple[int, ...] = ()
    previous: Call | None = None

    def to(self, device: torch.device | str) -> Call:
        """The same call with its tensors, and those of the previous one, on `device`."""
        return dataclasses.replace(
            self,
            args=map_tensors(self.args, lambda t: t.to(device)),
            kwargs=map_tensors(self.kwargs, lambda t: t.to(device)),
            previous=None if self.previous is None else self.previous.to(device),
        )

    def evaluate(self, model: nn.Module) -> Any:
        """What `model` returns for these inputs, moved to the device of its parameters."""
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        call = self.to(device)
        return model(*call.args, **call.kwargs)

    def tensors(self) -> list[Tensor]:
        """Every tensor of the call and of the previous one."""
        found: list[Tensor] = []
        map_tensors((self.args, self.kwargs), lambda t: found.append(t) or t)
        return found + ([] if self.previous is None else self.previous.tensors())


def map_tensors(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`tree` (nested tuples, lists and dictionaries) with every tensor replaced by `change(tensor)`."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {key: map_tensors(value, change) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return type(tree)(map_tensors(value, change) for value in tree)
    return tree


class CalibrationSet(Sequence[Call]):
    """Calls of one network, by trajectory and then in the order they were made; indexable and iterable.

    calls: the same as the set itself; read from disk one at a time when the set lies in a folder.
    settings: how they were collected; plain JSON values.
    """

    def __init__(self, calls: Sequence[Call], settings: dict[str, Any] | None = None) -> None:
        self.calls = calls
        self.settings: dict[str, Any] = settings or {}

    def __len__(self) -> int:
        return len(self.calls)

    @overload
    def __getitem__(self, index: int) -> Call: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Call]: ...
    def __getitem__(self, index: int | slice) -> Call | Sequence[Call]:
        return self.calls[index]

    def __iter__(self) -> Iterator[Call]:
        return iter(self.calls)

    def save(self, folder: str | Path) -> None:
        """Write the set to `folder`, one safetensors file for each trajectory.

        Raises: ConfigError if the folder holds another set.
        """
        folder = Path(folder)
        shards.claim(folder, self.settings)
        grouped: dict[int, list[Call]] = {}
        for call in self.calls:
            grouped.setdefault(call.trajectory, []).append(call)
        for trajectory, calls in grouped.items():
            shards.write(folder, trajectory, 0, calls, last=True)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """The set in `folder`; tensors are read when a call is asked for.

        Raises: FormatError if the folder, its settings or a shard is missing, damaged or of another version.
        """
        folder = Path(folder)
        settings = shards.read_settings(folder)
        trajectories = shards.complete(folder)
        wanted = settings.get("trajectories", len(trajectories))
        if len(trajectories) != wanted:
            raise FormatError(
                f"{folder}: expected {wanted} trajectories, got {len(trajectories)} whole ones. Collecting was "
                "interrupted, or files are missing. Collect again into the same folder: it goes on."
            )
        records = [record for trajectory in trajectories for record in shards.records(folder, trajectory)]
        return cls(LazyCalls(records, lambda record: call_from(record.read())), settings)


class LazyCalls(Sequence[Call]):
    """Calls made from `items`, each read when it is asked for: `LazyCalls(places, calls.__getitem__)`.

    items: what stands for the calls, such as places in another set. read: the call of one item.
    """

    def __init__(self, items: Sequence[Any], read: Callable[[Any], Call]) -> None:
        self._items, self._read = items, read

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> Call: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Call]: ...
    def __getitem__(self, index: int | slice) -> Call | Sequence[Call]:
        if isinstance(index, slice):
            return LazyCalls(self._items[index], self._read)
        return self._read(self._items[index])


def call_from(values: dict[str, Any]) -> Call:
    """A call from the fields that a shard holds."""
    previous = values["previous"]
    return Call(
        args=tuple(values["args"]),
        kwargs=values["kwargs"],
        step=values["step"],
        timestep=values["timestep"],
        context=values["context"],
        trajectory=values["trajectory"],
        rows=tuple(values["rows"]),
        previous=None if previous is None else call_from(previous),
    )
