"""Measured scales as named tensors, to be saved, and back, checked.

One set: `scale.0` and `zero_point.0` for segment 0, and so on. A set for each group of steps: `step_scale.0` and
`step_zero_point.0` with the groups along a new first axis, `moments` (M, 1 or 2) float64, `moment_sets` (M,) int64.
Zero points are missing for symmetric quantizers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modiff.core.affine import QParams
from modiff.core.step_sets import Moment
from modiff.errors import FormatError

Tables = dict[int, tuple[QParams, ...]]


def scale_tensors(
    static: tuple[QParams, ...] | None, tables: Tables | None, moments: dict[Moment, int]
) -> dict[str, Tensor]:
    """Names and tensors; {} where nothing was measured."""
    tensors: dict[str, Tensor] = {}
    for segment, qparams in enumerate(static or ()):
        tensors[f"scale.{segment}"] = qparams.scale.detach()
        if qparams.zero_point is not None:
            tensors[f"zero_point.{segment}"] = qparams.zero_point
    if tables:
        sets = [tables[index] for index in sorted(tables)]
        for segment in range(len(sets[0])):
            tensors[f"step_scale.{segment}"] = torch.stack([s[segment].scale.detach() for s in sets])
            points = [p for s in sets if (p := s[segment].zero_point) is not None]
            if points:
                tensors[f"step_zero_point.{segment}"] = torch.stack(points)
        tensors["moments"] = torch.tensor(list(moments), dtype=torch.float64)
        tensors["moment_sets"] = torch.tensor(list(moments.values()), dtype=torch.int64)
    return tensors


def load_scales(
    tensors: dict[str, Tensor], channels: tuple[int, ...], *, symmetric: bool
) -> tuple[tuple[QParams, ...] | None, Tables | None, dict[Moment, int]]:
    """The inverse of `scale_tensors`.

    Args:
        channels: how many scales each segment must have.
        symmetric: without zero points.
    Raises: FormatError for missing, unknown or misshapen tensors, and scales that are no positive numbers.
    """
    if not tensors:
        return None, None, {}
    steps = "moments" in tensors
    kinds = ("scale",) if symmetric else ("scale", "zero_point")
    prefix = "step_" if steps else ""
    names = {f"{prefix}{kind}.{segment}" for kind in kinds for segment in range(len(channels))}
    names |= {"moments", "moment_sets"} if steps else set()
    _require(set(tensors) == names, f"the tensors {', '.join(sorted(names))}", ", ".join(sorted(tensors)))
    moments, count = _moments(tensors) if steps else ({}, 1)
    segments = [_segment(tensors, prefix, i, n, count, symmetric) for i, n in enumerate(channels)]
    sets = {index: tuple(segment[index] for segment in segments) for index in range(count)}
    return (None, sets, moments) if steps else (sets[0], None, {})


def _segment(
    tensors: dict[str, Tensor], prefix: str, index: int, channels: int, count: int, symmetric: bool
) -> list[QParams]:
    """The scales of one segment, one entry for each set."""
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
