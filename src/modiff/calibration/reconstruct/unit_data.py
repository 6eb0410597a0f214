"""Inputs and targets of one unit: captured from runs of the network, kept on the CPU, drawn row by row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from modiff.calibration.data import Call, map_tensors
from modiff.errors import CalibrationError

ALIKE = 1e-2
"""Relative error up to which a row alone gives what it gives in its batch: kernels sum in another order."""


class Batch(NamedTuple):
    """args, kwargs: of one call of the unit, on its device. targets: its outputs in full precision. rows: how many."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: list[Tensor]
    rows: int


class Visit(NamedTuple):
    """One call of a unit while the network ran; tensors are copies on the CPU."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: list[Tensor]

    @property
    def rows(self) -> int:
        """The batch size, by the first output."""
        return len(self.targets[0])

    def leaves(self) -> list[Tensor]:
        """The tensors among the inputs."""
        return tensors_of((self.args, self.kwargs))


class Sample(NamedTuple):
    """A row of a visit, or all of it where rows cannot be told apart (None); `group` of visits that look alike."""

    visit: Visit
    row: int | None
    group: int


class _Reached(Exception):
    """The unit has run as often as it does in an evaluation: the rest of the network is not needed."""


def tensors_of(tree: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists and dictionaries, in order."""
    found: list[Tensor] = []
    map_tensors(tree, lambda t: found.append(t) or t)
    return found


def capture(
    model: nn.Module, unit: nn.Module, call: Call, calls: int | None, computing: AbstractContextManager[Any]
) -> list[Visit]:
    """What `unit` is called with and returns while the network evaluates `call`.

    Args:
        calls: after so many the evaluation is cut short; None lets it end.
        computing: how the layers compute meanwhile.
    Returns: a visit for each call of the unit; `targets` are its floating-point outputs.
    Cost: the network up to the unit, and copies of the unit's inputs and outputs.
    """
    inputs: list[tuple[Any, Any]] = []
    visits: list[Visit] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append((map_tensors(args, _to_cpu), map_tensors(kwargs, _to_cpu)))  # copies: it may write in place

    def after(_: nn.Module, _args: object, output: Any) -> None:
        args, kwargs = inputs.pop()
        visits.append(Visit(args, kwargs, [_to_cpu(t) for t in tensors_of(output) if t.is_floating_point()]))
        if len(visits) == calls:
            raise _Reached

    handles = [unit.register_forward_pre_hook(before, with_kwargs=True), unit.register_forward_hook(after)]
    try:
        with computing, torch.inference_mode(False), torch.no_grad():
            _fresh(call).evaluate(model)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return visits


def _fresh(call: Call) -> Call:
    """The call with copies of its tensors: the network may write into them, and they may be of inference mode."""
    args, kwargs = map_tensors((call.args, call.kwargs), torch.clone)
    return dataclasses.replace(call, args=args, kwargs=kwargs, previous=None)


def _to_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def paired(quantized: list[Visit], exact: list[Visit], name: str) -> list[Visit]:
    """The inputs of one run with the targets of the other. Raises: CalibrationError if the unit ran differently."""
    alike = [[t.shape for t in v.targets] for v in quantized] == [[t.shape for t in v.targets] for v in exact]
    if not alike:
        raise CalibrationError(
            f"{name}: expected the same calls in full precision and quantized, got {len(exact)} and {len(quantized)}, "
            "or other shapes. The network branches on values. Give the unit's layers as units of their own, or "
            "exclude it."
        )
    return [Visit(q.args, q.kwargs, e.targets) for q, e in zip(quantized, exact, strict=True)]


class UnitData:
    """The samples of one unit, some of them held out.

    Args:
        visits: all calls of the unit.
        run: the unit in full precision, to find out whether rows of different calls may stand in one batch.
        held_out: share of the samples to hold out, one at least.
        name: for messages.
    Raises: CalibrationError if there are fewer than two samples, or an output is not finite.
    """

    def __init__(
        self,
        visits: Sequence[Visit],
        run: Callable[[Batch], Any],
        *,
        device: torch.device,
        held_out: float,
        generator: torch.Generator,
        name: str,
    ) -> None:
        self.device = device
        samples: list[Sample] = []
        for index, group in enumerate(_groups(visits, name)):
            apart = self._rows_stand_alone(group, run)
            for visit in group:
                samples += [Sample(visit, row, index) for row in (range(visit.rows) if apart else (None,))]
        if len(samples) < 2:
            raise CalibrationError(
                f"{name}: expected at least two calibration samples, got {len(samples)}. One is learned on, another "
                "says whether that helped. Collect more calls, or larger batches."
            )
        order = torch.randperm(len(samples), generator=generator).tolist()
        count = min(max(1, round(held_out * len(samples))), len(samples) - 1)
        self.held = [samples[i] for i in order[:count]]
        self.training = [samples[i] for i in order[count:]]

    def draw(self, rows: int, generator: torch.Generator) -> Batch:
        """`rows` training rows without replacement, or fewer where there are no more, or a whole call."""
        order = torch.randperm(len(self.training), generator=generator).tolist()
        first = self.training[order[0]]
        if first.row is None:
            return self.batch([first])
        mates = (s for i in order if (s := self.training[i]).group == first.group)
        return self.batch([s for s, _ in zip(mates, range(rows), strict=False)])

    def held_batches(self, rows: int) -> Iterator[Batch]:
        """All samples held out, at most `rows` rows at a time."""
        yield from (self.batch([s]) for s in self.held if s.row is None)
        for group in sorted({s.group for s in self.held}):
            mine = [s for s in self.held if s.group == group and s.row is not None]
            for start in range(0, len(mine), rows):
                yield self.batch(mine[start : start + rows])

    def batch(self, samples: Sequence[Sample]) -> Batch:
        """The inputs and targets of some samples of one group, together."""
        first = samples[0].visit
        if samples[0].row is None:
            leaves, targets, count = first.leaves(), first.targets, first.rows
        else:
            columns = zip(*(s.visit.leaves() for s in samples), strict=True)
            leaves = [_stacked(c, samples) if _has_rows(c[0], first) else c[0] for c in columns]
            sides = zip(*(s.visit.targets for s in samples), strict=True)
            targets, count = [_stacked(side, samples) for side in sides], len(samples)
        moved = iter([leaf.to(self.device) for leaf in leaves])
        args, kwargs = map_tensors((first.args, first.kwargs), lambda _: next(moved))
        return Batch(args, kwargs, [t.to(self.device) for t in targets], count)

    @torch.no_grad()
    def _rows_stand_alone(self, group: list[Visit], run: Callable[[Batch], Any]) -> bool:
        """Whether rows of two calls give together what they give in their own batches: tried on two of them."""
        if any(t.dim() == 0 or len(t) != visit.rows for visit in group for t in visit.targets):
            return False
        picks = [Sample(group[0], group[0].rows - 1, 0), Sample(group[-1], 0, 0)]
        try:
            together = _floats(run(self.batch(picks)))
            for place, pick in enumerate(picks):
                alone = _floats(run(self.batch([Sample(pick.visit, None, 0)])))
                pairs = [(t[place], a[pick.row]) for t, a in zip(together, alone, strict=True)]
                if not all(t.shape == a.shape and _near(t, a) for t, a in pairs):
                    return False
        except (RuntimeError, ValueError, IndexError):  # shapes that fit no other batch
            return False
        return True


def _groups(visits: Sequence[Visit], name: str) -> list[list[Visit]]:
    """Visits whose inputs differ in their rows only."""
    groups: list[list[Visit]] = []
    for visit in visits:
        if not all(torch.isfinite(t).all() for t in visit.targets):
            raise CalibrationError(
                f"{name}: expected finite outputs, got NaN or infinity. A half-precision network overflowed, or its "
                "weights are damaged. Use float32, or exclude the layer."
            )
        for group in groups:
            if _alike(group[0], visit):
                group.append(visit)
                break
        else:
            groups.append([visit])
    return groups


def _alike(a: Visit, b: Visit) -> bool:
    """Same structure, shapes and settings, and equal in everything that has no rows."""
    mine, theirs = a.leaves(), b.leaves()
    if _skeleton(a) != _skeleton(b) or len(mine) != len(theirs):
        return False
    if [(t.shape[1:], t.dtype) for t in a.targets] != [(t.shape[1:], t.dtype) for t in b.targets]:
        return False
    for x, y in zip(mine, theirs, strict=True):
        rows = _has_rows(x, a)
        if rows != _has_rows(y, b) or x.dtype != y.dtype or x.shape[rows:] != y.shape[rows:]:
            return False
        if not rows and not torch.equal(x, y):
            return False
    return True


def _skeleton(visit: Visit) -> str:
    return repr(map_tensors((visit.args, visit.kwargs), lambda _: torch.empty(0)))


def _has_rows(tensor: Tensor, visit: Visit) -> bool:
    return tensor.dim() > 0 and len(tensor) == visit.rows


def _stacked(tensors: Sequence[Tensor], samples: Sequence[Sample]) -> Tensor:
    return torch.stack([t[s.row] for t, s in zip(tensors, samples, strict=True)])


def _floats(output: Any) -> list[Tensor]:
    return [t for t in tensors_of(output) if t.is_floating_point()]


def _near(a: Tensor, b: Tensor) -> bool:
    return float((a.double() - b.double()).norm()) <= ALIKE * float(b.double().norm()) + 1e-12
