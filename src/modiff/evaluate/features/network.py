"""Inception-v3 as published for TensorFlow on 2015-12-05: the network of FID, KID, sFID and Inception score.

Architecture: Szegedy et al. 2015, arXiv:1512.00567. It differs from the Inception-v3 that torch users know: 1008
logits, average pooling that leaves the padding out of the average, and maximum instead of average pooling in the very
last block. Parameter names are those of the public state dicts, `<block>.<unit>.conv.weight` and `<block>.<unit>.bn.*`.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from modiff.evaluate.metrics.frechet import spatial_rows

DIMENSION, LOGITS, SIDE = 2048, 1008, 299


class Unit(NamedTuple):
    """One convolution of a block: where its input comes from ("in", "pool" or a unit), width, kernel, stride."""

    source: str
    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


def _chain(name: str, *steps: tuple[int, tuple[int, int]], stride: int = 1) -> dict[str, Unit]:
    sources = ["in", *(f"{name}_{i}" for i in range(1, len(steps) + 1))]
    strides = [1] * (len(steps) - 1) + [stride]
    return {f"{name}_{i + 1}": Unit(sources[i], *step, strides[i]) for i, step in enumerate(steps)}


_1, _3, _5, _ROW, _COLUMN = (1, 1), (3, 3), (5, 5), (1, 7), (7, 1)


def _block_35(pool_width: int) -> dict[str, Unit]:
    return {
        "branch1x1": Unit("in", 64),
        **_chain("branch5x5", (48, _1), (64, _5)),
        **_chain("branch3x3dbl", (64, _1), (96, _3), (96, _3)),
        "branch_pool": Unit("pool", pool_width),
    }


def _block_17(width: int) -> dict[str, Unit]:
    return {
        "branch1x1": Unit("in", 192),
        **_chain("branch7x7", (width, _1), (width, _ROW), (192, _COLUMN)),
        **_chain("branch7x7dbl", (width, _1), (width, _COLUMN), (width, _ROW), (width, _COLUMN), (192, _ROW)),
        "branch_pool": Unit("pool", 192),
    }


_BLOCK_8 = {
    "branch1x1": Unit("in", 320),
    "branch3x3_1": Unit("in", 384),
    "branch3x3_2a": Unit("branch3x3_1", 384, (1, 3)),
    "branch3x3_2b": Unit("branch3x3_1", 384, (3, 1)),
    **_chain("branch3x3dbl", (448, _1), (384, _3)),
    "branch3x3dbl_3a": Unit("branch3x3dbl_2", 384, (1, 3)),
    "branch3x3dbl_3b": Unit("branch3x3dbl_2", 384, (3, 1)),
    "branch_pool": Unit("pool", 192),
}
_TO_17 = {"branch3x3": Unit("in", 384, _3, 2), **_chain("branch3x3dbl", (64, _1), (96, _3), (96, _3), stride=2)}
_TO_8 = {
    **_chain("branch3x3", (192, _1), (320, _3), stride=2),
    **_chain("branch7x7x3", (192, _1), (192, _ROW), (192, _COLUMN), (192, _3), stride=2),
}
_STEM = {
    "Conv2d_1a_3x3": (Unit("in", 32, _3, 2), (0, 0)),
    "Conv2d_2a_3x3": (Unit("in", 32, _3), (0, 0)),
    "Conv2d_2b_3x3": (Unit("in", 64, _3), (1, 1)),
    "Conv2d_3b_1x1": (Unit("in", 80), (0, 0)),
    "Conv2d_4a_3x3": (Unit("in", 192, _3), (0, 0)),
}
_MIXED = {
    "Mixed_5b": (_block_35(32), "average"),
    "Mixed_5c": (_block_35(64), "average"),
    "Mixed_5d": (_block_35(64), "average"),
    "Mixed_6a": (_TO_17, "shrink"),
    **{f"Mixed_6{x}": (_block_17(n), "average") for x, n in zip("bcde", (128, 160, 160, 192), strict=True)},
    "Mixed_7a": (_TO_8, "shrink"),
    "Mixed_7b": (_BLOCK_8, "average"),
    "Mixed_7c": (_BLOCK_8, "maximum"),
}
_HALVED_AFTER = ("Conv2d_2b_3x3", "Conv2d_4a_3x3")
_SPATIAL = "Mixed_6d"


class ConvUnit(nn.Module):
    """Convolution without bias, batch norm (ε 0.001), ReLU; strided ones are not padded."""

    def __init__(self, wide_in: int, unit: Unit, padding: tuple[int, int]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(wide_in, unit.width, unit.kernel, unit.stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(unit.width, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, width, H', W')."""
        return functional.relu(self.bn(self.conv(x)))


class InceptionBlock(nn.Module):
    """Units by name, each after its source; the outputs of those that feed no other are concatenated.

    pooling: "average" or "maximum" of 3 x 3 neighbours, read by units with the source "pool"; "shrink" is the maximum
    at every second position, and is an output itself, the last.
    """

    def __init__(self, wide_in: int, units: dict[str, Unit], pooling: str) -> None:
        super().__init__()
        widths = {"in": wide_in, "pool": wide_in, **{name: unit.width for name, unit in units.items()}}
        for name, unit in units.items():
            padding = (unit.kernel[0] // 2, unit.kernel[1] // 2) if unit.stride == 1 else (0, 0)
            self.add_module(name, ConvUnit(widths[unit.source], unit, padding))
        self._sources = {name: unit.source for name, unit in units.items()}
        self._pooling = pooling
        fed = set(self._sources.values())
        self._outputs = [name for name in units if name not in fed] + (["pool"] if pooling == "shrink" else [])
        self.width = sum(widths[name] for name in self._outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(N, wide_in, H, W) to (N, width, H', W')."""
        values = {"in": x, "pool": self._pooled(x)}
        for name, source in self._sources.items():
            values[name] = self.get_submodule(name)(values[source])
        return torch.cat([values[name] for name in self._outputs], dim=1)

    def _pooled(self, x: Tensor) -> Tensor:
        if self._pooling == "average":
            return functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        if self._pooling == "maximum":
            return functional.max_pool2d(x, 3, stride=1, padding=1)
        return functional.max_pool2d(x, 3, stride=2)


class InceptionNetwork(nn.Module):
    """The network up to its logits. Cost: 5.7 GMAC an image; 23.9 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        wide = 3
        for name, (unit, padding) in _STEM.items():
            self.add_module(name, ConvUnit(wide, unit, padding))
            wide = unit.width
        for name, (units, pooling) in _MIXED.items():
            block = InceptionBlock(wide, units, pooling)
            self.add_module(name, block)
            wide = block.width
        self.fc = nn.Linear(wide, LOGITS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of images (N, 3, 299, 299) in [-1, 1): pooled (N, 2048), spatial rows (N, 2023), logits (N, 1008).

        The logits are those without the bias of the last layer, as in the published Inception score.
        """
        spatial = x
        for name in itertools.chain(_STEM, _MIXED):
            if name == _SPATIAL:
                spatial = spatial_rows(self.get_submodule(f"{name}.branch1x1")(x))
            x = self.get_submodule(name)(x)
            if name in _HALVED_AFTER:
                x = functional.max_pool2d(x, 3, stride=2)
        pooled = x.mean(dim=(2, 3))
        return pooled, spatial, functional.linear(pooled, self.fc.weight)
