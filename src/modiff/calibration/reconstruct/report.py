"""What reconstruction did to each unit."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class UnitReport:
    """One unit: its name and class, the layers learned, and the loss on rows that were held out.

    before: of rounding to nearest, or of the scales as they were. after: of what the unit has now; never above before.
    learned: whether it keeps what was learned. iterations: how many were run. reason: why it stopped, or was left.
    """

    name: str
    kind: str
    layers: tuple[str, ...]
    before: float
    after: float
    learned: bool
    iterations: int
    reason: str

    @property
    def ratio(self) -> float:
        """after / before; 1 where there was nothing to gain."""
        return self.after / self.before if self.before > 0 else 1.0


@dataclass(frozen=True)
class ReconstructionReport:
    """Every unit, in the order of learning. Prints as a table."""

    units: tuple[UnitReport, ...]

    @property
    def learned(self) -> tuple[UnitReport, ...]:
        """The units that keep what they learned."""
        return tuple(u for u in self.units if u.learned)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, strings and numbers, for JSON."""
        return {"units": [dataclasses.asdict(u) | {"layers": list(u.layers)} for u in self.units]}

    def __add__(self, other: ReconstructionReport) -> ReconstructionReport:
        return ReconstructionReport(self.units + other.units)

    def __str__(self) -> str:
        width = max((len(u.name) for u in self.units), default=4)
        lines = [f"{len(self.learned)} of {len(self.units)} units learned (loss on held-out rows, before and after)"]
        for u in self.units:
            kept = "learned" if u.learned else "kept   "
            lines.append(
                f"  {u.name:<{width}}  {u.before:10.3e} -> {u.after:10.3e} {u.ratio:6.3f}  {kept}  "
                f"{u.iterations:>6} iterations  {u.reason}".rstrip()
            )
        return "\n".join(lines)
