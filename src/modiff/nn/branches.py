"""Which branch of a trajectory an evaluation is of: guidance in several calls, tiles, rows that come and go."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modiff.errors import StateError
from modiff.nn.weight import version_of

_MOST = 8
"""Sets of conditions that are told apart, unless the first timestep had more; beyond, the most similar one is taken."""
_PLAIN = (bool, int, float, str)
_TEXT = ("text", "prompt", "cap", "encoder")
"""Lists under such names hold a tensor for each prompt."""


def rows_at(x: Tensor, index: Tensor, where: str) -> Tensor:
    """Rows index[0], index[1], ... of x, as it lies in memory; x itself where one row serves all.

    Raises: StateError where x does not have the number of rows that `index` has.
    """
    if x.dim() < 2 or len(x) == 1:
        return x
    if len(x) != len(index):
        raise StateError(
            f"{where}: expected an index of its {len(x)} rows, got one of {len(index)}. A network may see each sample "
            "twice, as in guidance. Give the row that each row of its batch goes on from."
        )
    return torch.index_select(x, 0, index.to(x.device), out=torch.empty_like(x))


def moves(value: object) -> bool:
    """Whether a condition is a float, or one for each sample: a scale of guidance or a time may change at each step."""
    if isinstance(value, Tensor):
        return value.dim() < 2 and value.is_floating_point()
    return any(isinstance(each, float) for each in (value if isinstance(value, (list, tuple)) else (value,)))


class Inputs(NamedTuple):
    """What a network was given, but for the values of its sample and its timestep.

    shape: of the sample. conditions: prompts, masks, classes, flags, scales by name, each with its version counter.
    """

    shape: torch.Size | None = None
    conditions: Mapping[str, tuple[Any, int]] = {}

    def of_floats(self) -> "Inputs":
        """Without the conditions that are no floats, and those that one float may be the time of."""
        floats = {n: c for n, c in self.conditions.items()
                  if isinstance(c[0], Tensor) and c[0].is_floating_point() and not moves(c[0])}  # fmt: skip
        return Inputs(self.shape, floats)

    def reordered(self, index: Tensor) -> "Inputs":
        """With rows index[0], index[1], ... of the conditions that have the rows of a batch."""
        named = {n: (c, v) for n, (c, v) in self.conditions.items()
                 if isinstance(c, Tensor) and c.shape[:1] == index.shape}  # fmt: skip
        rows = {n: c[index.to(c.device)] for n, (c, v) in named.items() if version_of(c) == v}
        return Inputs(self.shape, {**self.conditions, **{n: (c, version_of(c)) for n, c in rows.items()}})

    def rows_in(self, larger: "Inputs") -> tuple[int, ...]:
        """For each row of the batch, the row of a larger one that had its conditions; () where one is new.

        Of several the last ones: guidance drops the first half. Without conditions nothing tells, and all are new.
        """
        (rows, *rest), (most, *others) = self.shape or (0,), larger.shape or (0,)
        both = [(each, larger.conditions.get(name, (None, 0))) for name, each in self.conditions.items()]
        tensors = [(x, y) for (x, v), (y, w) in both if isinstance(x, Tensor) and isinstance(y, Tensor)
                   and not moves(x) and (version_of(x), version_of(y)) == (v, w)]  # fmt: skip
        pairs = [(x, y) for x, y in tensors if (*x.shape[:1], *y.shape[:1]) == (rows, most)]
        free, taken = list(range(most)), list[int]()
        for i in reversed(range(rows)) if rest == others and rows < most and pairs else ():
            same = (j for j in reversed(free) if all(_equal(x[i], y[j]) for x, y in pairs))
            if (row := next(same, None)) is None:
                return ()
            free.remove(row)
            taken.insert(0, row)
        return tuple(taken)

    def rows_from(self, before: "Inputs") -> tuple[int, ...]:
        """For each row of the batch, the row of the one before that had its conditions, -1 for one that comes.

        () where nothing tells, or where all of a larger batch's or of the one before are not there.
        """
        if rows := self.rows_in(before):
            return rows
        there = before.rows_in(self)
        return tuple(there.index(i) if i in there else -1 for i in range((self.shape or (0,))[0])) if there else ()


def main_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first tensor among the arguments of a call."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def conditions_of(
    args: Sequence[Any], kwargs: Mapping[str, Any], sample: Tensor | None, timestep: tuple[str, int] | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a network is told besides its sample and timestep: tensors, and flags and lists of numbers or words.

    Images and lists of tensors change from step to step: left out.

    Args:
        timestep: name and position of the argument that holds it.
    """
    named: dict[str, Any] = {str(i): value for i, value in enumerate(args)} | dict(kwargs)
    main = main_of(args, kwargs)
    named = {name: value for name, value in named.items() if timestep is None or name not in map(str, timestep)}
    for name, inner in list(named.items()):
        if isinstance(inner, dict):
            named |= {f"{name}.{key}": value for key, value in inner.items()}
        elif isinstance(inner, (list, tuple)) and any(word in name for word in _TEXT):
            named |= {f"{name}.{i}": value for i, value in enumerate(inner)}
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for name, value in named.items():
        if isinstance(value, Tensor):
            if value.dim() < 4 and value is not main and value is not sample:
                tensors[name] = value
        elif all(isinstance(v, _PLAIN) for v in (value if isinstance(value, (list, tuple)) else (value,))):
            plain[name] = value
    return tensors, plain


def inputs_of(
    args: Sequence[Any], kwargs: Mapping[str, Any], sample: Tensor | None, timestep: tuple[str, int] | None
) -> Inputs:
    """The inputs of a call, as `conditions_of` has them; without a sample its first tensor is one."""
    tensors, plain = conditions_of(args, kwargs, sample, timestep)
    sample = main_of(args, kwargs) if sample is None else sample
    conditions = {name: (x, version_of(x)) for name, x in tensors.items()}
    return Inputs(None if sample is None else sample.shape, conditions | {n: (value, 0) for n, value in plain.items()})


def _same(one: tuple[Any, int] | None, other: tuple[Any, int] | None) -> bool:
    if one is None or other is None:
        return one is other
    (x, before), (y, version) = one, other
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        return type(x) is type(y) and x == y
    if x is y or version_of(x) != before:  # written in place since, what it held is gone
        return x is y and version == before
    return _equal(x, y)


def _equal(x: Tensor, y: Tensor) -> bool:
    return (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device) and torch.equal(x, y)


class Fork(NamedTuple):
    """A batch goes on with other rows in a context of its own: row i was row index[i] of `rows` in `context`.

    -1 is a row that comes: its states start now. Either rows come or rows go.
    """

    context: str
    index: tuple[int, ...]
    rows: int

    @property
    def grows(self) -> bool:
        """Whether rows come."""
        return -1 in self.index

    def size(self, count: int) -> int:
        """How many `count` rows become, where a row of the batch is as many of them as any; otherwise as many."""
        return count if count % self.rows else count // self.rows * len(self.index)

    def take(self, x: Tensor, come: Tensor | None = None) -> Tensor:
        """The rows of x that go on, as it lies in memory, and those that `come`, zeros where it is None."""
        each = 0 if len(x) % self.rows else len(x) // self.rows
        index = [each * row + i if row >= 0 else 0 for row in self.index for i in range(each)] or [*range(len(x))]
        layout = sorted(range(x.dim()), key=lambda axis: -x.stride(axis))
        out = torch.empty_permuted((len(index), *x.shape[1:]), layout, dtype=x.dtype, device=x.device)
        torch.index_select(x, 0, torch.tensor(index, device=x.device), out=out)
        if each and self.grows:
            out[self.coming(len(out), x.device)] = 0.0 if come is None else come.to(x.dtype)
        return out

    def coming(self, count: int, device: torch.device) -> Tensor:
        """Which of `count` rows of the batch that goes on come now."""
        each = count // len(self.index)
        return torch.tensor([row < 0 for row in self.index for _ in range(each)], device=device)


class _Kind:
    """Evaluations of one shape of the sample under the same conditions.

    changing: conditions that turned out to differ from step to step. settled: the others came again at a later
    timestep. step: the last timestep that had one, counted. visits: how many it had; total: how many the first had,
    which tells tiles and windows from a sampler that visits a timestep twice, as Heun's does.
    """

    def __init__(self, inputs: Inputs, total: int) -> None:
        self.inputs, self.total = inputs, total
        self.changing: set[str] = set()
        self.settled, self.step, self.visits = False, -1, 0

    def differences(self, inputs: Inputs) -> set[str]:
        """The conditions that are not what they were."""
        mine, others = self.inputs.conditions, inputs.conditions
        return {n for n in ({*mine, *others} - self.changing) if not _same(mine.get(n), others.get(n))}

    def moved(self, inputs: Inputs, names: set[str]) -> bool:
        """Whether of conditions that differ each is a float that both have."""
        both = (each.conditions.get(name, (None, 0))[0] for name in names for each in (self.inputs, inputs))
        return all(map(moves, both))

    def visit(self, step: int) -> tuple[int, bool]:
        """Number k mod total of evaluation k at a timestep, and whether the one before had as many as the first."""
        regular = True
        if step == self.step:
            self.visits += 1
        else:
            self.total = self.total or self.visits
            regular = not self.visits or (self.visits % self.total == 0 and self.visits <= 2 * self.total)
            self.step, self.visits = step, 1
        return (self.visits - 1) % (self.total or self.visits), regular


class Branches:
    """Those of the context `name`. Evaluations whose conditions or shape of the sample differ are of different ones.

    Floats that differ tell branches of one timestep apart, and may have moved at the next. Conditions that change from
    step to step tell nothing: at the third timestep, where none has come again, an evaluation goes on with the branch
    of the one before that differs least.
    fork: where the rows of the last evaluation were, if its branch is new and a batch had them at the last timestep.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.kinds: list[_Kind] = []
        self.fork: Fork | None = None
        self.first = self.now = float("nan")
        self.times, self.way = set[float](), 0.0  # that came, and the longest way from the first to one
        self.step, self.limit = -1, _MOST
        self.uncertain = False
        self._numbers: dict[tuple[int, int], int] = {}

    def knows(self, inputs: Inputs) -> bool:
        """Whether an evaluation had these inputs."""
        return any(kind.inputs.shape == inputs.shape and not kind.differences(inputs) for kind in self.kinds)

    def ended(self, now: float) -> bool:
        """Whether the first timestep comes again after others, or shapes change without end.

        Also at a timestep that did not come before, half of the way back or more: those of another schedule.
        """
        back = (self.now - now) / self.way if self.way and now not in self.times else 0.0
        return now == self.first != self.now or 0.5 <= back <= 2 or len(self.kinds) > 2 * self.limit

    def number(self, now: float, inputs: Inputs, *, ordered: bool) -> tuple[int, bool]:
        """The branch of the evaluation that begins; False where it is not certain. ordered: repeats have their own."""
        if now != self.now or self.step < 0:
            self.now, self.step = now, self.step + 1
            self.first = now if self.step == 0 else self.first
            self.times.add(now)
            self.way = max(self.way, now - self.first, key=abs)
        kinds, kind = self.kinds.copy(), self._kind(inputs)
        number, regular = kind.visit(self.step)
        if not ordered:
            number, regular = 0, kind.visits < 3
        index = self._numbers.setdefault((self.kinds.index(kind), number), len(self._numbers))
        self.fork = None
        for at, before in enumerate(kinds if kind not in kinds else ()):
            branch = self._numbers.get((at, number)) if before.step == self.step - 1 else None
            if branch is not None and (rows := inputs.rows_from(before.inputs)):
                self.fork = Fork(self.context(branch), rows, before.inputs.shape[0])
        return index, regular or self.uncertain

    def context(self, number: int) -> str:
        """What a branch is called."""
        return f"{self.name} #{number}" if number else self.name

    def _kind(self, inputs: Inputs) -> _Kind:
        differing = {kind: kind.differences(inputs) for kind in self.kinds if kind.inputs.shape == inputs.shape}

        def visits(kind: _Kind) -> int:
            return kind.visits if kind.step == self.step else 0

        if fitting := [kind for kind, names in differing.items() if not names]:
            kind = min(fitting, key=visits)
            kind.settled |= 0 <= kind.step < self.step
            return kind
        moved = [kind for kind, names in differing.items() if not visits(kind) and kind.moved(inputs, names)]
        if moved and self.now == self.now:
            moved[0].inputs, moved[0].settled = inputs, True
            return moved[0]
        early = self.step < (2 if self.now == self.now else 4)
        if (self.step == 0 or len(differing) < self.limit) and (
            early or not differing or any(kind.settled for kind in differing)
        ):
            totals = (kind.total or kind.visits for kind in self.kinds if self.step)
            self.kinds.append(_Kind(inputs, max(totals, default=0)))
            self.limit = max(self.limit, 2 * len(self.kinds)) if self.step == 0 else self.limit
            return self.kinds[-1]
        recent = [kind for kind in differing if kind.step >= self.step - 1] or list(differing)
        kind = min(recent, key=lambda kind: (visits(kind), len(differing[kind]), -kind.step))
        for one in recent:
            one.changing |= differing[kind]
        return kind
