"""Finite sets of scales: which steps share one, and which set serves the present step (TFMQ-DM, section 5.5)."""

from __future__ import annotations

import math

from modiff.core.observers import Observer
from modiff.errors import CalibrationError

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
