"""Calibration data: what a network is called with while trajectories run, and running it on that again."""

import dataclasses
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modiff.calibration.data import (
    CalibrationSet,
    Call,
    calls_with_previous,
    complete_trajectories,
    map_tensors,
    shard_folder,
    tensors_of,
    write_shard,
)
from modiff.calibration.timesteps import StepSampler
from modiff.config import check
from modiff.errors import CalibrationError
from modiff.model.attach import ATTRIBUTE, Attachment, attachment_of
from modiff.model.facts import facts_of
from modiff.model.observe import observe
from modiff.model.report import Report
from modiff.model.trajectory import model_trajectory
from modiff.nn import Clock
from modiff.nn.weight import version_of
from modiff.progress import Bar


def record_calls(
    model: nn.Module, run: Callable[[int], object], *, trajectories: int = 1, batch: int | None = None,
    steps: int | None = None, sampler: StepSampler | None = None, pairs: bool = False, seed: int = 0,
    folder: str | Path | None = None, memory_mib: float = 1024.0, progress: bool = True,
) -> CalibrationSet:  # fmt: skip
    """As `modiff.collect`, on one network: with modulated layers, the states of the trajectory that they really run."""
    for name, value in (("trajectories", trajectories), ("batch", batch), ("steps", steps)):
        check(f"collect.{name}", value, value is None or value >= 1, "1 or more", "There is nothing to keep. Use 1.")
    check("collect.steps", steps, sampler is None or steps is not None, "the evaluations in a trajectory",
          "A sampler chooses among them. Give steps=50 for 50 DDIM steps, 99 for 50 Heun steps.")  # fmt: skip
    check("collect.memory_mib", memory_mib, memory_mib > 0, "more than 0", "Calls need room. Use 1024.")
    plan = None
    if sampler is not None and steps is not None:
        plan = sampler.draw(steps, trajectories * (batch or 1), torch.Generator().manual_seed(seed))
    kind = None if sampler is None else {"name": type(sampler).__name__} | sampler.to_dict()
    settings = {"network": type(model).__name__, "trajectories": trajectories, "batch": batch, "steps": steps,
                "sampler": kind, "pairs": pairs, "seed": seed}  # fmt: skip
    with nullcontext() if folder is None else shard_folder(folder, settings) as shards:
        store = _Store(None if shards is None else shards.path, memory_mib)
        done = [] if shards is None else complete_trajectories(shards.path)
        with _recorded(model, _Recorder(model, plan, batch, pairs, store)) as recorder, torch.no_grad():
            for index in Bar(range(trajectories), desc="calibration data", unit="run", shown=progress):
                if index not in done:
                    store.trajectory = index
                    run(index)
                    recorder.end()
    return CalibrationSet(store.calls, settings) if folder is None else CalibrationSet.load(folder)


class _Store:
    """Calls in memory up to a cap, then on disk."""

    def __init__(self, folder: Path | None, memory_mib: float) -> None:
        self.folder, self.cap = folder, memory_mib * 2**20
        self.calls: list[Call] = []
        self.trajectory, self.shard, self.bytes = 0, 0, 0.0
        self._counted: dict[int, Tensor] = {}

    def add(self, call: Call) -> None:
        """Keep one more call; over the cap all go to disk. Raises: CalibrationError without a folder."""
        for tensor in call.tensors():
            if id(tensor) not in self._counted:  # calls share what did not change from step to step
                self._counted[id(tensor)] = tensor
                self.bytes += tensor.numel() * tensor.element_size()
        self.calls.append(call)
        if self.bytes <= self.cap:
            return
        if self.folder is None:
            raise CalibrationError(
                f"collect: expected at most {self.cap / 2**20:g} MiB of calls, got {len(self.calls)} calls with "
                f"{self.bytes / 2**20:.1f} MiB. Memory is bounded. Give folder= for shards on disk, or memory_mib=."
            )
        self.flush(last=False)

    def flush(self, *, last: bool) -> None:
        if self.folder is not None:
            write_shard(self.folder, self.trajectory, self.shard, self.calls, last=last)
            self.shard = 0 if last else self.shard + 1
            self.calls, self.bytes = [], 0.0
            self._counted.clear()


_Rows = tuple[int, tuple[int, ...]]  # the length of the batch axis, and the positions kept


class _Recorder:
    """Called before each evaluation of the network: counts them in each context and keeps those of the plan."""

    def __init__(
        self, model: nn.Module, plan: Tensor | None, batch: int | None, pairs: bool, store: _Store
    ) -> None:  # fmt: skip
        facts = facts_of(model)
        self.plan, self.batch, self.pairs, self.store = plan, batch, pairs, store
        self.clock: Clock | None = None
        self.timestep, self.unbatched = facts.timestep_argument(model), facts.unbatched  # the latter are kept whole
        self._steps: dict[str, int] = {}
        self._last: dict[str, Call] = {}
        self._copies: dict[tuple[int, int, tuple[int, ...]], tuple[weakref.ref[Tensor], Tensor]] = {}

    def end(self) -> None:
        """A trajectory ended. Raises: CalibrationError if it was shorter than planned, or never began."""
        seen = max(self._steps.values(), default=-1) + 1
        if seen == 0 or (self.plan is not None and seen != len(self.plan)):
            expected = "at least 1" if self.plan is None else str(len(self.plan))
            raise CalibrationError(
                f"collect: expected {expected} evaluations in trajectory {self.store.trajectory}, got {seen}. "
                f"Some samplers evaluate twice in a step. {f'Give steps={seen}' if seen else 'Run the network in run'}."
            )
        for kept in (self._steps, self._last, self._copies):
            kept.clear()
        self.store.flush(last=True)

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        context = "default" if self.clock is None else self.clock.context
        step = self._steps[context] = self._steps.get(context, -1) + 1
        rows = self._rows(step)
        previous = self._last.pop(context, None)
        if rows is not None:
            call = self._call(args, kwargs, step, context, rows)
            self.store.add(dataclasses.replace(call, previous=previous))
        following = self._rows(step + 1) if self.pairs else None
        if following is not None:
            self._last[context] = self._call(args, kwargs, step, context, following)

    def _rows(self, step: int) -> tuple[int, ...] | None:
        if self.plan is None:
            return ()
        if step >= len(self.plan):
            return None
        columns = self.batch or 1
        kept = self.plan[step].split(columns)[self.store.trajectory]
        if not kept.any():
            return None
        return () if self.batch is None or bool(kept.all()) else tuple(kept.nonzero().flatten().tolist())

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any], step: int, context: str, rows: Any) -> Call:
        value = None
        if self.timestep is not None:
            name, position = self.timestep
            value = kwargs.get(name, args[position] if position < len(args) else None)
        chosen = self._positions(args, kwargs, rows)
        copies = {k: self._copies_of(v, None if k in self.unbatched else chosen) for k, v in kwargs.items()}
        timestep = None if value is None else float(torch.as_tensor(value).flatten()[0])
        return Call(self._copies_of(args, chosen), copies, step, timestep, context, self.store.trajectory, rows)

    def _positions(self, args: tuple[Any, ...], kwargs: dict[str, Any], rows: tuple[int, ...]) -> _Rows | None:
        if not rows or self.batch is None:
            return None
        batched = tensors_of((args, {k: v for k, v in kwargs.items() if k not in self.unbatched}))
        length = next((len(t) for t in batched if t.dim() > 1), None)
        if length is None or length % self.batch:
            raise CalibrationError(
                f"collect.batch: expected a batch axis of {self.batch} samples, or a multiple of it for guidance, got "
                f"{length or 'no tensor with one'}. Rows belong to samples. Give the images in a run."
            )
        return length, tuple(first + row for first in range(0, length, self.batch) for row in rows)

    def _copies_of(self, tree: Any, chosen: _Rows | None) -> Any:
        return map_tensors(tree, lambda tensor: self._copied(tensor, chosen))

    def _copied(self, tensor: Tensor, chosen: _Rows | None) -> Tensor:
        length, positions = chosen or (0, ())
        if length < 2 or tensor.dim() == 0 or len(tensor) != length:
            positions = ()
        key = (id(tensor), version_of(tensor), positions)
        rows = tensor.detach()[list(positions)] if positions else tensor.detach()
        if key in self._copies and tensor.is_inference():  # it may be written in place without a new version
            kept = self._copies[key][1]
            if rows.shape != kept.shape or not torch.equal(rows.cpu(), kept):
                del self._copies[key]
        if key not in self._copies:
            # the entry goes with the tensor: its id may be that of another one later
            alive = weakref.ref(tensor, lambda _: self._copies.pop(key, None))
            self._copies[key] = (alive, rows.to("cpu", copy=True))
        return self._copies[key][1]


@contextmanager
def _recorded(model: nn.Module, recorder: _Recorder) -> Iterator[_Recorder]:
    attachment = attachment_of(model)
    plain = attachment is None
    if attachment is None:
        attachment = model.__dict__[ATTRIBUTE] = Attachment(Clock(type(model).__name__), Report(()))
    recorder.clock = attachment.clock
    try:
        with observe(model, before_step=recorder):
            yield recorder
    finally:
        if plain:
            model.__dict__.pop(ATTRIBUTE, None)


def replay(model: nn.Module, calls: Sequence[Call], *, progress: bool = False) -> None:
    """Evaluate the network on each call, for `modiff.calibrate(model, lambda: replay(model, calls))`.

    Modulated layers see each call as the second step of a trajectory whose first step is the call before it: they
    quantize the residual of the two (MoDiff). Calls of a first step have no residual and are left out.

    Raises: CalibrationError without calls, or with modulated layers and no call that holds the one before it.
    Cost: one evaluation a call, two with modulated layers.
    """
    attachment = attachment_of(model)
    modulated = attachment is not None and any(quantized.inputs is not None for quantized in attachment.layers.values())
    if modulated:
        calls = calls_with_previous("replay", calls)
    elif not len(calls):
        raise CalibrationError("replay: expected calls, got none. There is nothing to run. Collect a trajectory.")
    together = model_trajectory(model) if attachment is not None and not modulated else nullcontext()
    with torch.no_grad(), together:
        for call in Bar(calls, desc="replay", unit="call", shown=progress):
            with model_trajectory(model) if modulated else nullcontext():
                if modulated and call.previous is not None:
                    call.previous.evaluate(model)
                call.evaluate(model)
