"""A state dict of the public Inception-v3 layout with drawn weights, from a table of its own."""

from __future__ import annotations

import torch
from torch import Tensor

STEM = {
    "Conv2d_1a_3x3": (32, 3, 3, 3),
    "Conv2d_2a_3x3": (32, 32, 3, 3),
    "Conv2d_2b_3x3": (64, 32, 3, 3),
    "Conv2d_3b_1x1": (80, 64, 1, 1),
    "Conv2d_4a_3x3": (192, 80, 3, 3),
}


def _at_35(wide: int, pool: int) -> dict[str, tuple[int, ...]]:
    return {
        "branch1x1": (64, wide, 1, 1),
        "branch5x5_1": (48, wide, 1, 1),
        "branch5x5_2": (64, 48, 5, 5),
        "branch3x3dbl_1": (64, wide, 1, 1),
        "branch3x3dbl_2": (96, 64, 3, 3),
        "branch3x3dbl_3": (96, 96, 3, 3),
        "branch_pool": (pool, wide, 1, 1),
    }


def _at_17(n: int) -> dict[str, tuple[int, ...]]:
    return {
        "branch1x1": (192, 768, 1, 1),
        "branch7x7_1": (n, 768, 1, 1),
        "branch7x7_2": (n, n, 1, 7),
        "branch7x7_3": (192, n, 7, 1),
        "branch7x7dbl_1": (n, 768, 1, 1),
        "branch7x7dbl_2": (n, n, 7, 1),
        "branch7x7dbl_3": (n, n, 1, 7),
        "branch7x7dbl_4": (n, n, 7, 1),
        "branch7x7dbl_5": (192, n, 1, 7),
        "branch_pool": (192, 768, 1, 1),
    }


def _at_8(wide: int) -> dict[str, tuple[int, ...]]:
    return {
        "branch1x1": (320, wide, 1, 1),
        "branch3x3_1": (384, wide, 1, 1),
        "branch3x3_2a": (384, 384, 1, 3),
        "branch3x3_2b": (384, 384, 3, 1),
        "branch3x3dbl_1": (448, wide, 1, 1),
        "branch3x3dbl_2": (384, 448, 3, 3),
        "branch3x3dbl_3a": (384, 384, 1, 3),
        "branch3x3dbl_3b": (384, 384, 3, 1),
        "branch_pool": (192, wide, 1, 1),
    }


MIXED = {
    "Mixed_5b": _at_35(192, 32),
    "Mixed_5c": _at_35(256, 64),
    "Mixed_5d": _at_35(288, 64),
    "Mixed_6a": {
        "branch3x3": (384, 288, 3, 3),
        "branch3x3dbl_1": (64, 288, 1, 1),
        "branch3x3dbl_2": (96, 64, 3, 3),
        "branch3x3dbl_3": (96, 96, 3, 3),
    },
    "Mixed_6b": _at_17(128),
    "Mixed_6c": _at_17(160),
    "Mixed_6d": _at_17(160),
    "Mixed_6e": _at_17(192),
    "Mixed_7a": {
        "branch3x3_1": (192, 768, 1, 1),
        "branch3x3_2": (320, 192, 3, 3),
        "branch7x7x3_1": (192, 768, 1, 1),
        "branch7x7x3_2": (192, 192, 1, 7),
        "branch7x7x3_3": (192, 192, 7, 1),
        "branch7x7x3_4": (192, 192, 3, 3),
    },
    "Mixed_7b": _at_8(1280),
    "Mixed_7c": _at_8(2048),
}

UNITS = {**STEM, **{f"{block}.{unit}": shape for block, units in MIXED.items() for unit, shape in units.items()}}


def shapes() -> dict[str, tuple[int, ...]]:
    """Every parameter and running statistic by name."""
    found: dict[str, tuple[int, ...]] = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    for name, shape in UNITS.items():
        found[f"{name}.conv.weight"] = shape
        for part in ("weight", "bias", "running_mean", "running_var"):
            found[f"{name}.bn.{part}"] = shape[:1]
    return found


def drawn(seed: int = 0) -> dict[str, Tensor]:
    """Weights that keep the size of what passes through."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith("running_var"):
            return torch.rand(shape, generator=generator) + 0.5
        if name.endswith("bn.weight"):
            return torch.rand(shape, generator=generator) + 0.5
        values = torch.randn(shape, generator=generator)
        return values * (2 / values[0].numel()) ** 0.5 if values.ndim > 1 else values * 0.1

    return {name: tensor(name, shape) for name, shape in shapes().items()}
