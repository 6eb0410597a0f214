"""Inception-v3 features from a state dict that the user has: only their results may be called FID, sFID, KID, IS.

The network as published for TensorFlow on 2015-12-05 (Szegedy et al. 2015, arXiv:1512.00567). It differs from the
Inception-v3 that torch users know: 1008 logits, average pooling that leaves the padding out of the average, and maximum
instead of average pooling in the very last block. Parameter names are those of the public state dicts.
"""

import itertools
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from modiff.evaluate.features.extractor import Features, check_images, file_digest, load_weights
from modiff.evaluate.metrics.frechet import spatial_rows

DIMENSION, LOGITS, SIDE = 2048, 1008, 299
PUBLIC_SHA256 = "6726825d"
"""How the sha256 of the public file begins; its name, pt_inception-2015-12-05-6726825d.pth, says so."""
_PIXELS = "Images are resized as by TensorFlow 1 and scaled by (x - 128) / 128."
_GET_IT = (
    "Give the public file pt_inception-2015-12-05-6726825d.pth, or one made from it; ImageNet weights of 1000 classes "
    "are not those of FID."
)


class Inception:
    """Features of the published Inception-v3, from a state dict: .safetensors or a torch file (read with weights_only).

    Pixels are prepared as in the original graph: resized to 299 as by TensorFlow 1, scaled by (x - 128) / 128. pooled:
    2048 averages after the last block. probabilities: softmax over 1008 logits without their bias, as in the published
    Inception score. spatial: the sFID convention, 2023 numbers.
    Raises: FormatError if the file is missing, damaged or of another network.
    Cost: 5.7 GMAC an image.
    """

    dimension = DIMENSION

    def __init__(self, file: str | Path, *, device: str | torch.device = "cpu") -> None:
        path = Path(file)
        with torch.device("meta"):
            network = InceptionNetwork()
        load_weights(network, path, _GET_IT)
        self._network = network.to(device)
        self._device = torch.device(device)
        sha256 = file_digest(path)
        self.name = f"inception-v3:{sha256}:tensorflow"
        self.note = f"Inception-v3, the public weights file. {_PIXELS}" if sha256 == PUBLIC_SHA256 else (
            f"The weights file is not byte for byte the public one (sha256 {sha256}..., public {PUBLIC_SHA256}...): "
            f"the results compare with published ones only if the weights are the same. {_PIXELS}"
        )  # fmt: skip

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Features of uint8 images (N, H, W, C); grey ones are repeated to three channels.

        Raises: ConfigError for other images.
        """
        check_images(images, "Inception")
        pixels = images.to(self._device).permute(0, 3, 1, 2).float().expand(-1, 3, -1, -1)
        pooled, spatial, logits = self._network((tensorflow_resize(pixels, SIDE) - 128) / 128)
        return Features(*(rows.cpu() for rows in (pooled, spatial, logits.softmax(1))))


def tensorflow_resize(images: Tensor, size: int) -> Tensor:
    """Images (N, C, H, W), float, to (N, C, size, size), as `tf.image.resize_bilinear(align_corners=False)` did.

    Output pixel i is taken at i * H / size: pixel corners are aligned at the top left and not at the bottom right.
    Beyond the last pixel the border is repeated; nothing is smoothed before shrinking.
    """
    for dim in (3, 2):
        length = images.shape[dim]
        position = torch.arange(size, dtype=images.dtype, device=images.device) * (length / size)
        lower = position.long().clamp_max(length - 1)
        share = (position - lower).view(-1, *[1] * (3 - dim))
        low = images.index_select(dim, lower)
        images = low + (images.index_select(dim, (lower + 1).clamp_max(length - 1)) - low) * share
    return images


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
    """The network up to its logits; 23.9 million parameters."""

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
