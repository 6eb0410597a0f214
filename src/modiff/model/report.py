"""What modiff did to each layer of a model, how the layer runs and why, and the memory it takes."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from modiff.config import LayerConfig
from modiff.core.quantizer import Quantizer
from modiff.nn import ModulatedLayer
from modiff.nn.loop.integer import IntegerLoop

PARAMETER, ADAPTER = "parameter of ", "belongs to an adapter"
"""How the kind of a matrix begins that another kind of module holds; the reason to leave an adapter's layers."""


@dataclass(frozen=True)
class Entry:
    """One Linear or Conv layer of the model, or a matrix that a module of another kind holds.

    name, kind: of the module and its class. weights: their number. config: None where the layer was left.
    reason: why it was left, or what is special about it ("split at 128", "may share with to_q"); may be empty.
    execution: "simulated" or "integers on <backend>". why: the reason of that backend, or why a layer that was to run
    on integers is simulated. anchor: what the input meets where the states start, "exact weights", "quantized weights"
    or "int8 anchor codes (1.5 bytes a weight)", and whether a sample leaves it once it is nearer to zero. states: their
    dtype. All four are empty where nothing was applied yet, the last two for a layer without states.
    """

    name: str
    kind: str
    weights: int
    config: LayerConfig | None
    reason: str
    execution: str = ""
    why: str = ""
    anchor: str = ""
    states: str = ""

    @property
    def is_layer(self) -> bool:
        """Whether it is a Linear or Conv layer of the network, and no adapter's or another module's matrix."""
        return not self.kind.startswith(PARAMETER) and self.reason != ADAPTER

    @property
    def setting(self) -> str:
        """Short form of the config."""
        return "full precision" if self.config is None else self.config.setting


class MemoryUse(NamedTuple):
    """Bytes of the taken layers, each tensor counted once.

    floats: weights and biases before rounding; gone after `pack`. codes: integers and their scales, backends: copies in
    the layout of a backend, both made at the first step. states: the most that one trajectory ended with so far.
    expected: of one generation of the host's usual size, from shapes alone; None where that is not known. at_least:
    that it is not known of other networks.
    """

    floats: int = 0
    codes: int = 0
    backends: int = 0
    states: int = 0
    expected: int | None = 0
    at_least: bool = False

    def __str__(self) -> str:
        later = f"{_size(self.codes)} in codes, {_size(self.backends)} in backends"
        later = later if self.codes else "codes and backends from step 1 on"
        states = f"; states {_size(self.states)}" if self.states else "; states unknown before the first run"
        if not self.states and self.expected:
            states = f"; states {'at least' if self.at_least else 'about'} {_size(self.expected)} for one generation"
        elif not self.states and self.expected == 0 and not self.at_least:
            states = ""
        return f"memory: weights {_size(self.floats)} in floats, {later}{states}"


def _size(count: int) -> str:
    power = 3 if count >= 2**30 else 2 if count >= 2**17 else 1
    return f"{count / 1024**power:.1f} {'KMG'[power - 1]}iB"


@dataclass(frozen=True)
class Report:
    """Every Linear and Conv layer of a model: those taken, those left, and why. Prints as a summary.

    memory: measured when the report was made; None where nothing was applied.
    """

    entries: tuple[Entry, ...]
    memory: MemoryUse | None = None

    @property
    def taken(self) -> tuple[Entry, ...]:
        """The layers that modiff runs now."""
        return tuple(e for e in self.entries if e.config is not None)

    @property
    def left(self) -> tuple[Entry, ...]:
        """The layers that stayed as they were."""
        return tuple(e for e in self.entries if e.config is None)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and strings, for JSON."""
        keys = ("name", "kind", "weights", "setting", "reason", "execution", "why", "anchor", "states")
        layers = [{k: getattr(e, k) for k in keys} for e in self.entries]
        return {"layers": layers, "memory": None if self.memory is None else self.memory._asdict()}

    def __add__(self, other: "Report") -> "Report":
        memories = [m for m in (self.memory, other.memory) if m is not None]
        known = [m.expected for m in memories if m.expected is not None]
        part = len(known) < len(memories) or any(m.at_least for m in memories)
        sums = (sum(column) for column in zip(*(m[:4] for m in memories), strict=True))
        memory = MemoryUse(*sums, sum(known) if known else None, part and bool(known)) if memories else None
        return Report(self.entries + other.entries, memory)

    def __str__(self) -> str:
        weights = sum(e.weights for e in self.entries) or 1
        share = 100 * sum(e.weights for e in self.taken) / weights
        lines = [f"{len(self.taken)} layers taken ({share:.1f} % of the weights), {len(self.left)} left"]
        runs = [(e.execution, e.why) for e in self.taken if e.execution]
        lines += [f"  {runs.count(run)} {run[0]}{': ' * bool(run[1])}{run[1]}" for run in dict.fromkeys(runs)]
        anchors = Counter((e.anchor, e.states) for e in self.entries if e.anchor)
        lines += [f"  {n} anchor with {anchor}, states in {dtype}" for (anchor, dtype), n in anchors.items()]
        if self.memory is not None:
            lines.append(f"  {self.memory}")
        groups: dict[tuple[str, ...], list[Entry]] = {}
        for e in self.entries:
            reason = e.reason.partition(":")[0] if e.config is None else e.reason if ":" in e.reason else ""
            groups.setdefault((e.kind, e.setting, e.execution.removeprefix("integers "), reason), []).append(e)
        rows = [(f"{len(group)} {kind}", setting, f"{100 * sum(e.weights for e in group) / weights:.1f} %", execution,
                 reason or _first(group)) for (kind, setting, execution, reason), group in groups.items()]  # fmt: skip
        return "\n".join([*lines, *_aligned(rows)])

    def table(self) -> str:
        """A row for each layer, those that differ by numbers in their names in one."""
        groups: dict[tuple[str, ...], list[str]] = {}
        for e in self.entries:
            alike = re.sub(r"(?<![^.])\d+(?![^.])", "*", e.name)
            cells = alike, e.kind, e.setting, e.execution.removeprefix("integers "), e.reason
            groups.setdefault(cells, []).append(e.name)
        rows = [(names[0] if len(names) == 1 else f"{alike} ({len(names)})", *cells)
                for (alike, *cells), names in groups.items()]  # fmt: skip
        return "\n".join(_aligned(rows))


def _first(group: list[Entry]) -> str:
    return f"{group[0].name}{', ...' if len(group) > 1 else ''}"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    used = [i for i, width in enumerate(widths) if width]
    return ["  ".join(["", *(f"{row[i]:<{widths[i]}}" for i in used), row[-1]]).rstrip() for row in rows]


def execution_of(layer: ModulatedLayer) -> tuple[str, str]:
    """How a layer runs, and why: as `Entry` has them."""
    if layer.config.execution == "simulated":
        return "simulated", ""
    if not isinstance(layer.loop, IntegerLoop):
        return "simulated", layer.unsupported
    choices = dict.fromkeys((choice.backend, choice.reason) for choice in layer.loop.choices())
    backends = " and ".join(dict.fromkeys(backend for backend, _ in choices))
    return f"integers on {backends}" if backends else "integers", "; ".join(reason for _, reason in choices)


def coded_values(quantizer: Quantizer) -> str:
    """Which steps predict zero, by their static scales."""
    sets = quantizer.tables
    steps = "" if sets is None else f" at {len(quantizer.of_values)} of {len(sets)} steps"
    return f"codes values: residuals need larger scales{steps}"


def memory_of(layers: Iterable[ModulatedLayer], states: int, expected: int | None) -> MemoryUse:
    """What these layers take now, and the bytes of their states, measured and expected."""
    floats, codes, backends = 0, 0, 0
    parameters: dict[int, Tensor] = {}  # layers may share them
    for layer in layers:
        parameters |= {p.data_ptr(): p for p in layer.parameters(recurse=False)}
        rotated, integers = layer.quantized_weight.bytes_kept()
        floats, codes = floats + rotated, codes + integers + sum(b.nbytes for b in layer.buffers(recurse=False))
        backends += layer.loop.bytes_of_backends() if isinstance(layer.loop, IntegerLoop) else 0
    floats += sum(p.nbytes for p in parameters.values() if p.is_floating_point())
    codes += sum(p.nbytes for p in parameters.values() if not p.is_floating_point())
    return MemoryUse(floats, codes, backends, states, expected)
