"""Inputs and targets of one unit: captured from runs of the network, kept on the CPU, drawn row by row."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from modiff.calibration.data import Call, map_tensors, tensors_of
from modiff.errors import CalibrationError
from modiff.model.observe import observe

TOLERANCE = 1e-2
"""Relative error up to which a row alone gives what it gives in its batch: kernels sum in another order."""


class UnitCall(NamedTuple):
    """One call of a unit, and its outputs in full precision: copies on the CPU, or a batch on its device.

    exact: arguments in full precision, where they are kept. step: of the trajectory. weights: of a batch's rows; None
    where all count the same.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: list[Tensor]
    exact: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
    step: int = 0
    weights: Tensor | None = None

    @property
    def rows(self) -> int:
        """The batch size, of the first output."""
        return len(self.targets[0])

    def inputs(self) -> list[Tensor]:
        """The tensors among the inputs."""
        return tensors_of((self.args, self.kwargs, self.exact))

    def has_rows(self, tensor: Tensor) -> bool:
        """Whether an input has the batch axis."""
        return tensor.dim() > 0 and len(tensor) == self.rows


class Sample(NamedTuple):
    """A row of a call, or all of it where rows cannot be told apart (None); `group` of calls that look alike."""

    call: UnitCall
    row: int | None
    group: int
    weight: float = 1.0


class _Enough(Exception):
    """The unit has run as often as it does in an evaluation: the rest of the network is not needed."""


def capture(
    model: nn.Module, unit: str, call: Call, calls: int | None, computing: AbstractContextManager[Any]
) -> list[UnitCall]:
    """The calls of the module named `unit` while the network evaluates `call`; `targets` are its float outputs.

    calls: after this many the evaluation is cut short; None lets it end. computing: how the layers compute meanwhile.
    """
    inputs, captured = list[tuple[Any, Any]](), list[UnitCall]()

    def before(_name: str, _unit: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(map_tensors((args, kwargs), _to_cpu))  # copies: it may write in place

    def after(_name: str, _unit: nn.Module, _inputs: object, output: Any) -> None:
        captured.append(UnitCall(*inputs.pop(), [_to_cpu(t) for t in _floats(output)]))
        if len(captured) == calls:
            raise _Enough

    try:
        with computing, torch.inference_mode(False), torch.no_grad():
            # copies: the network may write into the call's tensors, and they may be of inference mode
            args, kwargs = map_tensors((call.args, call.kwargs), torch.clone)
            with observe(model, after, layers=[unit], before_layer=before):
                dataclasses.replace(call, args=args, kwargs=kwargs, previous=None).evaluate(model)
    except _Enough:
        pass
    return captured


def _to_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def paired(
    quantized: list[UnitCall], exact: list[UnitCall], name: str, step: int = 0, *, both_inputs: bool = False
) -> list[UnitCall]:
    """The inputs of one run with the targets of the other. Raises: CalibrationError if the unit ran differently."""
    if [[t.shape for t in c.targets] for c in quantized] != [[t.shape for t in c.targets] for c in exact]:
        raise CalibrationError(
            f"{name}: expected the same calls in full precision and quantized, got {len(exact)} and {len(quantized)}, "
            "or other shapes. The network branches on values. Make its layers units of their own, or exclude it."
        )
    pairs = zip(quantized, exact, strict=True)
    inputs = [(e.args, e.kwargs) if both_inputs else ((), {}) for e in exact]
    return [UnitCall(q.args, q.kwargs, e.targets, kept, step) for (q, e), kept in zip(pairs, inputs, strict=True)]


class UnitData:
    """The samples of one unit, a share of them, one at least, held out.

    run: the unit in full precision, which tells whether rows of different calls may stand in one batch.
    Raises: CalibrationError if there are fewer than two samples, or an output is not finite.
    """

    def __init__(
        self, calls: Sequence[UnitCall], run: Callable[[UnitCall], Any], *, device: torch.device, held_out: float,
        generator: torch.Generator, name: str,
    ) -> None:  # fmt: skip
        self.device = device
        samples: list[Sample] = []
        for index, group in enumerate(_groups(calls, name)):
            apart = self._rows_stand_alone(group, run)
            for call in group:
                samples += [Sample(call, row, index) for row in (range(call.rows) if apart else (None,))]
        if len(samples) < 2:
            raise CalibrationError(
                f"{name}: expected at least two calibration samples, got {len(samples)}. One is learned on, another "
                "says whether that helped. Collect more calls, or larger batches."
            )
        order = torch.randperm(len(samples), generator=generator).tolist()
        count = min(max(1, round(held_out * len(samples))), len(samples) - 1)
        self.held = [samples[i] for i in order[:count]]
        self.training = [samples[i] for i in order[count:]]

    def draw(self, rows: int, generator: torch.Generator) -> UnitCall:
        """`rows` training rows without replacement, or fewer where there are no more, or a whole call."""
        order = torch.randperm(len(self.training), generator=generator).tolist()
        first = self.training[order[0]]
        if first.row is None:
            return self.batch([first])
        alike = (s for i in order if (s := self.training[i]).group == first.group)
        return self.batch([s for s, _ in zip(alike, range(rows), strict=False)])

    def held_batches(self, rows: int) -> Iterator[UnitCall]:
        """All samples held out, at most `rows` rows at a time."""
        yield from self.batches(self.held, rows)

    def batches(self, samples: Sequence[Sample], rows: int) -> Iterator[UnitCall]:
        """Samples of any group, at most `rows` rows at a time."""
        yield from (self.batch([s]) for s in samples if s.row is None)
        for group in sorted({s.group for s in samples}):
            alike = [s for s in samples if s.group == group and s.row is not None]
            for start in range(0, len(alike), rows):
                yield self.batch(alike[start : start + rows])

    def batch(self, samples: Sequence[Sample]) -> UnitCall:
        """The inputs and targets of some samples of one group, together."""
        first = samples[0].call
        inputs, targets = first.inputs(), first.targets
        if samples[0].row is not None:
            columns = zip(*(s.call.inputs() for s in samples), strict=True)
            inputs = [_stacked(c, samples) if first.has_rows(c[0]) else c[0] for c in columns]
            targets = [_stacked(c, samples) for c in zip(*(s.call.targets for s in samples), strict=True)]
        moved = iter([tensor.to(self.device) for tensor in inputs])
        args, kwargs, exact = map_tensors((first.args, first.kwargs, first.exact), lambda _: next(moved))
        weights = [s.weight for s in samples]
        uneven = torch.tensor(weights, device=self.device) if set(weights) != {1.0} else None
        return UnitCall(args, kwargs, [t.to(self.device) for t in targets], exact, first.step, uneven)

    @torch.no_grad()
    def _rows_stand_alone(self, group: list[UnitCall], run: Callable[[UnitCall], Any]) -> bool:
        if any(t.dim() == 0 or len(t) != call.rows for call in group for t in call.targets):
            return False
        picks = [Sample(group[0], group[0].rows - 1, 0), Sample(group[-1], 0, 0)]
        try:
            together = _floats(run(self.batch(picks)))
            for position, pick in enumerate(picks):
                alone = _floats(run(self.batch([Sample(pick.call, None, 0)])))
                pairs = [(t[position], a[pick.row]) for t, a in zip(together, alone, strict=True)]
                if not all(t.shape == a.shape and _near(t, a) for t, a in pairs):
                    return False
        except (RuntimeError, ValueError, IndexError):  # shapes that fit no other batch
            return False
        return True


def _groups(calls: Sequence[UnitCall], name: str) -> list[list[UnitCall]]:
    groups: list[list[UnitCall]] = []
    for call in calls:
        if not all(torch.isfinite(t).all() for t in call.targets):
            raise CalibrationError(
                f"{name}: expected finite outputs, got NaN or infinity. A half-precision network overflowed, or its "
                "weights are damaged. Use float32, or exclude the layer."
            )
        alike = next((group for group in groups if _alike(group[0], call)), [])
        if not alike:
            groups.append(alike)
        alike.append(call)
    return groups


def _alike(a: UnitCall, b: UnitCall) -> bool:
    pairs = zip(a.inputs(), b.inputs(), strict=False)
    return _form(a) == _form(b) and all(a.has_rows(x) or torch.equal(x, y) for x, y in pairs)


def _form(call: UnitCall) -> tuple[Any, ...]:
    structure = repr(map_tensors((call.args, call.kwargs, call.exact), lambda _: torch.empty(0)))
    inputs = [(t.dtype, call.has_rows(t), t.shape[call.has_rows(t) :]) for t in call.inputs()]
    return structure, inputs, [(t.dtype, t.shape[1:]) for t in call.targets]


def _stacked(tensors: Sequence[Tensor], samples: Sequence[Sample]) -> Tensor:
    return torch.stack([t[s.row] for t, s in zip(tensors, samples, strict=True)])


def _floats(output: Any) -> list[Tensor]:
    return [t for t in tensors_of(output) if t.is_floating_point()]


def _near(a: Tensor, b: Tensor) -> bool:
    return float((a.double() - b.double()).norm()) <= TOLERANCE * float(b.double().norm()) + 1e-12
