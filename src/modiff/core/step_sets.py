"""Finite sets of scales: which steps share one, and which set serves the present step (TFMQ-DM, section 5.5)."""

from __future__ import annotations

import math
import warnings

from modiff.core.observers import Observer
from modiff.errors import CalibrationError, ModiffWarning

MARGIN = 1.5
"""How much larger than the calibrated ones a step may be: a few steps less are as good, half of them are not."""

Moment = tuple[float, ...]
"""What tells steps apart: (timestep,) for values, (timestep, timestep before) for residuals.

A residual depends on how far the last step was: a sampler of half as many steps must not find the scales of another.
"""


def grouped(
    watched: dict[Moment, tuple[Observer, ...]], groups: int
) -> tuple[dict[int, tuple[Observer, ...]], dict[Moment, int]]:
    """Observers of the moments, merged into at most `groups` groups of neighbours (0: no merging), and who is where.

    Moments are ordered by timestep, the largest first; the first of a group takes in the others.
    """
    ordered = sorted(watched, reverse=True)
    count = min(groups or len(ordered), len(ordered))
    moments = {moment: i * count // len(ordered) for i, moment in enumerate(ordered)}
    merged: dict[int, tuple[Observer, ...]] = {}
    for moment, index in moments.items():
        if index not in merged:
            merged[index] = watched[moment]
            continue
        for mine, other in zip(merged[index], watched[moment], strict=True):
            mine.merge(other)
    return merged, moments


def set_of(now: Moment, moments: dict[Moment, int]) -> int:
    """The index of the set that was calibrated at this moment, up to float32 rounding of timesteps.

    Raises: CalibrationError if none was: the nearest one would be a silent mistake.
    """
    if now in moments:
        return moments[now]
    for moment, index in moments.items():
        if len(moment) == len(now) and all(
            math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-6) for a, b in zip(moment, now, strict=True)
        ):
            return index
    known = sorted(moments, reverse=True)
    raise CalibrationError(
        f"Quantizer: expected a step of the {len(known)} calibrated ones, {_words(known[0])} to "
        f"{_words(known[-1])}, got "
        f"{_words(now)}. Each step has scales of its own. Sample with the steps of the calibration, or calibrate again."
    )


def _words(moment: Moment) -> str:
    return f"timestep {moment[0]:g}" + (f" after {moment[1]:g}" if len(moment) > 1 else "")


class StepSizes:
    """How large the steps were that static scales of residuals were measured with: larger ones saturate them.

    largest: |timestep - timestep before|; None while nothing was measured, or without timesteps.
    measuring: steps count as measured; otherwise they are checked.
    """

    def __init__(self, largest: float | None = None, *, measuring: bool = False) -> None:
        self.largest, self.measuring = largest, measuring
        self._warned = False

    @property
    def matter(self) -> bool:
        """Whether anything is to be done with the size of a step."""
        return self.measuring or (self.largest is not None and not self._warned)

    def see(self, name: str, size: float) -> None:
        """Take a step of the network `name` into account. Warns once if it is much larger than the calibrated ones."""
        if self.measuring:
            self.largest = max(size, self.largest or 0.0)
        elif self.largest is not None and size > MARGIN * self.largest and not self._warned:
            self._warned = True
            warnings.warn(
                f"{name}: expected steps of at most {self.largest:g} timesteps, as its static scales were measured "
                f"with, got one of {size:g}. The residuals of larger steps exceed the scales. Calibrate with as few "
                "steps as you sample with, or use dynamic scales.",
                ModiffWarning,
                stacklevel=2,
            )
