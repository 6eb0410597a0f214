"""What a method that learns did: the layers it took, and the loss of each unit before and after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from modiff.calibration.reconstruct.config import ReconstructionReport
from modiff.model.report import Report


@dataclass(frozen=True)
class LearnedReport(Report):
    """The layers, and what was learned; None where nothing was to be learned.

    weights: units whose rounding was learned. steps: units whose static scales were.
    """

    weights: ReconstructionReport | None = None
    steps: ReconstructionReport | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, strings and numbers, for JSON."""
        learned = {"weights": self.weights, "steps": self.steps}
        return super().to_dict() | {n: None if r is None else r.to_dict()["units"] for n, r in learned.items()}

    def __str__(self) -> str:
        parts = [super().__str__()]
        parts += [f"Rounding of weights: {self.weights}"] if self.weights is not None else []
        parts += [f"Static scales: {self.steps}"] if self.steps is not None else []
        return "\n".join(parts)
