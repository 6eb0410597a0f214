"""The choice of Autotune for one layer: a pure function of times and errors."""

from __future__ import annotations

from dataclasses import dataclass

from modiff.model.layer_times import MODES, Mode, Seconds

MARGIN = 0.97
"""Integers must take at most this share of the time of floats: less is noise, and floats have no error."""


@dataclass(frozen=True)
class GateRow:
    """One layer.

    calls: of one evaluation. seconds: of one call in each mode, measured. expected: the least that memory and
    arithmetic of this machine allow. errors: of coding the input, plain and modulated. state_bytes: of both states,
    float32, if it is modulated.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    calls: float
    seconds: Seconds
    expected: Seconds
    errors: tuple[float, float]
    state_bytes: int
    choice: Mode
    reason: str

    def line(self, width: int) -> str:
        """One line of a table: times in milliseconds, measured and (expected)."""
        times = "  ".join(f"{m} {1e3 * self.seconds[m]:.3f} ({1e3 * self.expected[m]:.3f})" for m in MODES)
        errors = f"error plain {self.errors[0]:.4f} modulated {self.errors[1]:.4f}"
        size = f"state {self.state_bytes / 2**20:.2f} MiB"
        return f"  {self.name:<{width}}  {self.choice:<9}  {times} ms  {errors}  {size}  {self.reason}"


def choose(seconds: Seconds, errors: tuple[float, float], tolerance: float, unsupported: str = "") -> tuple[Mode, str]:
    """The fastest mode whose error is within the tolerance, and why; floats unless integers are clearly faster.

    Args:
        errors: plain, modulated. unsupported: why integers are out, empty if they are not.

    >>> choose({"float": 3.0, "plain": 1.0, "modulated": 1.5}, (0.02, 0.001), 0.01)
    ('modulated', '2.00x as fast as floats')
    """
    if unsupported:
        return "float", f"no integers: {unsupported}"
    exact: list[Mode] = [m for m, error in zip(("plain", "modulated"), errors, strict=True) if error <= tolerance]
    if not exact:
        return "float", "no integers are exact enough"
    best = min(exact, key=lambda mode: seconds[mode])
    if seconds[best] > MARGIN * seconds["float"]:
        return "float", f"integers do not pay: {best} takes {seconds[best] / seconds['float']:.2f}x the time"
    return best, f"{seconds['float'] / seconds[best]:.2f}x as fast as floats"
