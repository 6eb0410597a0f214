"""Finite sets of scales: which steps share one, which set serves the present step (TFMQ-DM, 5.5), and their tensors.

Named tensors of one set: `scale.0` and `zero_point.0` for run 0, and so on. A set for each group of steps:
`step_scale.0` and `step_zero_point.0` with the groups along a new first axis, `moments` (M, 1 or 2) float64,
`moment_sets` (M,) int64. Zero points are missing for symmetric quantizers. `of_values`: int64 indices of the sets that
were measured on values and not on residuals; missing where there are none.
"""

import math
import warnings

import torch
from torch import Tensor

from modiff.core.affine import QParams
from modiff.core.observers import Observer
from modiff.errors import CalibrationError, FormatError, ModiffWarning

MARGIN = 1.5
"""How much larger than the calibrated ones a step may be: a few steps less are as good, half of them are not."""

OF_VALUES = "of_values"
Moment = tuple[float, ...]
"""What tells steps apart: (timestep,) for values, (timestep, timestep before) for residuals.

A residual depends on how far the last step was: a sampler of half as many steps must not get the scales of another.
"""
Tables = dict[int, tuple[QParams, ...]]


def grouped(
    watched: dict[Moment, tuple[Observer, ...]], groups: int
) -> tuple[dict[int, tuple[Observer, ...]], dict[Moment, int]]:
    """Observers of the moments, merged into at most `groups` groups of neighbours (0: no merging), and their members.

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
        for observer, other in zip(merged[index], watched[moment], strict=True):
            observer.merge(other)
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
        f"Quantizer: expected a step of the {len(known)} calibrated ones, {_words(known[0])} to {_words(known[-1])}, "
        f"got {_words(now)}. Each step has its own scales. Sample with the calibrated steps, or calibrate again."
    )


def _words(moment: Moment) -> str:
    return f"timestep {moment[0]:g}" + (f" after {moment[1]:g}" if len(moment) > 1 else "")


class StepSizes:
    """How large the steps were that static scales of residuals were measured with: larger ones saturate them.

    largest: |timestep - timestep before|, None if there is none. measuring: steps count; otherwise they are checked.
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


def scale_tensors(
    static: tuple[QParams, ...] | None, tables: Tables | None, moments: dict[Moment, int]
) -> dict[str, Tensor]:
    """Names and tensors; {} where nothing was measured."""
    tensors: dict[str, Tensor] = {}
    sets = [tables[index] for index in sorted(tables)] if tables else [static] if static else []
    for run, each in enumerate(zip(*sets, strict=True)):
        for kind, values in zip(("scale", "zero_point"), zip(*each, strict=True), strict=True):
            if values[0] is not None:
                stacked = torch.stack([value.detach() for value in values])
                tensors[f"step_{kind}.{run}" if tables else f"{kind}.{run}"] = stacked if tables else stacked[0]
    if tables:
        tensors["moments"] = torch.tensor(list(moments), dtype=torch.float64)
        tensors["moment_sets"] = torch.tensor(list(moments.values()), dtype=torch.int64)
    return tensors


def read_scale_tensors(
    tensors: dict[str, Tensor], channels: tuple[int, ...], *, symmetric: bool
) -> tuple[tuple[QParams, ...] | None, Tables | None, dict[Moment, int]]:
    """The inverse of `scale_tensors`; `channels` says how many scales each run must have.

    Raises: FormatError for missing, unknown or misshapen tensors, and scales that are not positive numbers.
    """
    if not tensors:
        return None, None, {}
    steps = "moments" in tensors
    kinds = ("scale",) if symmetric else ("scale", "zero_point")
    prefix = "step_" if steps else ""
    names = {f"{prefix}{kind}.{run}" for kind in kinds for run in range(len(channels))}
    names |= {"moments", "moment_sets"} if steps else set()
    _require(set(tensors) == names, f"the tensors {', '.join(sorted(names))}", ", ".join(sorted(tensors)))
    moments, count = _moments(tensors) if steps else ({}, 1)
    runs = [_scales_of_run(tensors, prefix, i, n, count, symmetric) for i, n in enumerate(channels)]
    sets = {index: tuple(run[index] for run in runs) for index in range(count)}
    return (None, sets, moments) if steps else (sets[0], None, {})


def read_indices(indices: Tensor | None, count: int) -> frozenset[int]:
    """Which of `count` sets a tensor of indices names; none without it. Raises: FormatError for others."""
    if indices is None:
        return frozenset()
    named = frozenset(indices.tolist()) if indices.dtype == torch.int64 and indices.dim() == 1 else frozenset({-1})
    _require(named <= frozenset(range(count)), f"int64 indices of {count} sets", f"{indices.dtype} {indices.tolist()}")
    return named


def _scales_of_run(
    tensors: dict[str, Tensor], prefix: str, index: int, channels: int, count: int, symmetric: bool
) -> list[QParams]:
    scale = tensors[f"{prefix}scale.{index}"]
    fits = scale.is_floating_point() and scale.numel() == channels * count and (not prefix or len(scale) == count)
    _require(fits, f"{count} x {channels} scales", f"{tuple(scale.shape)} {scale.dtype}")
    _require(bool((torch.isfinite(scale) & (scale > 0)).all()), "finite scales above 0", "others")
    scales = list(scale) if prefix else [scale]
    if symmetric:
        return [QParams(s, None) for s in scales]
    point = tensors[f"{prefix}zero_point.{index}"]
    _require(point.shape == scale.shape and point.dtype == torch.int32, f"int32 zero points {tuple(scale.shape)}",
             f"{tuple(point.shape)} {point.dtype}")  # fmt: skip
    return [QParams(s, z) for s, z in zip(scales, list(point) if prefix else [point], strict=True)]


def _moments(tensors: dict[str, Tensor]) -> tuple[dict[Moment, int], int]:
    moments, sets = tensors["moments"], tensors["moment_sets"]
    fits = moments.dim() == 2 and moments.shape[1] in (1, 2) and sets.shape == moments.shape[:1] and len(sets) > 0
    _require(fits, "moments (M, 1 or 2) and as many sets", f"{tuple(moments.shape)} and {tuple(sets.shape)}")
    indices = [int(i) for i in sets.tolist()]
    count = len(set(indices))
    _require(set(indices) == set(range(count)), "sets numbered from 0", str(sorted(set(indices))))
    return {tuple(map(float, m)): i for m, i in zip(moments.tolist(), indices, strict=True)}, count


def _require(valid: bool, expected: str, got: str) -> None:
    if not valid:
        raise FormatError(
            f"scales: expected {expected}, got {got}. They belong to another layer or config. Save the model again."
        )
