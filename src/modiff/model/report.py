"""What `apply` did to each layer, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from modiff.config import LayerConfig


@dataclass(frozen=True)
class Entry:
    """One Linear or Conv layer of the model.

    name: module name. kind: torch class name. weights: number of weights. config: None when the layer was left.
    reason: why it was left, or what is special about it ("split at 128", "may share with to_q"); may be empty.
    """

    name: str
    kind: str
    weights: int
    config: LayerConfig | None
    reason: str

    @property
    def setting(self) -> str:
        """Short form of the config, for example "W8A4 modulated"."""
        if self.config is None:
            return "full precision"
        weight, activation = self.config.weight.bits or 32, self.config.activation.bits
        mode = "plain" if self.config.modulation is None else "modulated"
        if activation is None:
            return f"W{weight}A32"
        return f"W{weight}A{activation} {mode}"


@dataclass(frozen=True)
class Report:
    """Every Linear and Conv layer of a model: those taken, those left, and why. Prints as a table."""

    entries: tuple[Entry, ...]

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
        keys = ("name", "kind", "weights", "setting", "reason")
        return {"layers": [{k: getattr(e, k) for k in keys} for e in self.entries]}

    def __add__(self, other: Report) -> Report:
        return Report(self.entries + other.entries)

    def __str__(self) -> str:
        weights = sum(e.weights for e in self.entries) or 1
        share = 100 * sum(e.weights for e in self.taken) / weights
        width = max((len(e.name) for e in self.entries), default=4)
        lines = [f"{len(self.taken)} layers taken ({share:.1f} % of the weights), {len(self.left)} left"]
        lines += [f"  {e.name:<{width}}  {e.kind:<8} {e.setting:<16} {e.reason}".rstrip() for e in self.entries]
        return "\n".join(lines)
