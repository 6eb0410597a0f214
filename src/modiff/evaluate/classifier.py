"""A small image classifier: feature extractor of the image metrics, and the judge of what a diffusion model draws.

A folder holds `config.json` (format version, architecture) and `model.safetensors` (float16 weights).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modiff.errors import ConfigError, FormatError

FORMAT_VERSION = 1
_CONFIG, WEIGHTS = "config.json", "model.safetensors"


class Classifier(nn.Module):
    """Blocks of 3x3 convolution, 2x2 maximum (not in the last), batch norm and ReLU; averaged, then one linear layer.

    Args:
        channels: channels of each block; the last is the number of features D.
        image_channels: 1 for grey, 3 for colour.
        classes: number of logits.
        layers: convolutions in each block, with batch norm and ReLU each; the maximum follows the last one.
    Raises: ConfigError if a count is not a positive integer.
    Cost: about 4 MMAC for a 32x32 grey image with the default channels.

    >>> Classifier(channels=(4, 8), classes=3)(torch.zeros(2, 1, 32, 32)).shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        channels: Sequence[int] = (16, 32, 64, 128),
        image_channels: int = 1,
        classes: int = 10,
        layers: int = 1,
    ) -> None:
        super().__init__()
        widths = (image_channels, *channels)
        if not channels or any(type(n) is not int or n < 1 for n in (*widths, classes, layers)):
            raise ConfigError(
                "Classifier: expected positive integers for channels, image_channels, classes and layers, got "
                f"{channels!r}, {image_channels!r}, {classes!r} and {layers!r}. Each is a number of planes, logits or "
                "convolutions. Give for example channels=(16, 32, 64, 128), image_channels=1, classes=10, layers=1."
            )
        self.channels, self.image_channels, self.classes, self.layers = tuple(channels), image_channels, classes, layers
        blocks: list[nn.Module] = []
        for index, (wide_in, wide_out) in enumerate(itertools.pairwise(widths), start=1):
            for layer in range(1, layers + 1):
                blocks.append(nn.Conv2d(wide_in if layer == 1 else wide_out, wide_out, 3, padding=1, bias=False))
                if layer == layers and index < len(channels):
                    blocks.append(nn.MaxPool2d(2))  # before norm and ReLU: a quarter of the values to write and read
                blocks += [nn.BatchNorm2d(wide_out), nn.ReLU()]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels[-1], classes)

    def features(self, images: Tensor) -> Tensor:
        """What the last layer sees, averaged over the image: (N, channels, H, W) in [-1, 1] to (N, D).

        Any floating dtype goes in; the computation and the result have the dtype of the weights.
        Raises: ConfigError for integer images, another number of channels, or an image too small to be halved.
        """
        smallest = 2 ** (len(self.channels) - 1)
        fits = images.ndim == 4 and images.shape[1] == self.image_channels and min(images.shape[2:]) >= smallest
        if not fits or not images.is_floating_point():
            raise ConfigError(
                f"Classifier: expected float images (N, {self.image_channels}, H, W) of at least {smallest} pixels a "
                f"side, got {tuple(images.shape)} {images.dtype}. Images are scaled to [-1, 1], channels first. "
                "For uint8 images give `images.float() / 127.5 - 1`."
            )
        return self.blocks(images.to(self.head.weight.dtype)).mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, channels, H, W) in [-1, 1]."""
        return self.head(self.features(images))


def save_classifier(model: Classifier, folder: str | Path) -> None:
    """Write `config.json` and `model.safetensors` (floats as float16) into `folder`, made if missing.

    Raises: FormatError if a weight is not finite in float16; then nothing is written.
    """
    folder = Path(folder)
    tensors = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).cpu().contiguous()
        for name, tensor in model.state_dict().items()
    }
    _check_finite(tensors, folder / WEIGHTS)
    config = {
        "format_version": FORMAT_VERSION,
        "channels": list(model.channels),
        "image_channels": model.image_channels,
        "classes": model.classes,
    }
    if model.layers > 1:
        config["layers"] = model.layers
    folder.mkdir(parents=True, exist_ok=True)
    # Written beside and moved over: a full disk or Ctrl-C leaves the old files whole.
    save_file(tensors, folder / f"{WEIGHTS}.tmp")
    (folder / f"{_CONFIG}.tmp").write_text(json.dumps(config, indent=2) + "\n")
    for name in (WEIGHTS, _CONFIG):
        (folder / f"{name}.tmp").replace(folder / name)


def load_classifier(folder: str | Path) -> Classifier:
    """The classifier of `folder` in evaluation mode, on the CPU, with float32 weights that ask for no gradient.

    Raises: FormatError if the folder, its config or its weights are missing, damaged or of another version.
    """
    folder = Path(folder)
    config = _read_config(folder / _CONFIG)
    try:
        model = Classifier(**config)
    except (ConfigError, TypeError) as error:
        raise FormatError(
            f"{folder / _CONFIG}: expected the fields channels, image_channels and classes, got "
            f"{config}. {error} Save the folder with save_classifier."
        ) from error
    model.load_state_dict(_read_weights(folder / WEIGHTS, model))
    return model.eval().requires_grad_(False)


def _read_config(path: Path) -> dict[str, Any]:
    """The arguments of `Classifier` in a config file of this format version."""
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise FormatError(
            f"{path}: expected the config of a classifier folder, got {type(error).__name__}: {error}. "
            "The folder is missing, damaged or holds something else. Give a folder written by save_classifier."
        ) from error
    version = config.pop("format_version", None) if isinstance(config, dict) else None
    if version != FORMAT_VERSION:
        raise FormatError(
            f"{path}: expected format_version {FORMAT_VERSION}, got {version!r}. The folder is not a classifier or "
            "comes from another version of modiff. Give a folder written by save_classifier."
        )
    return config


def _read_weights(path: Path, model: Classifier) -> dict[str, Tensor]:
    """The float32 tensors of a weights file, checked against the names and shapes that `model` has."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise FormatError(
            f"{path}: expected a safetensors file, got {type(error).__name__}: {error}. "
            "The file is missing or damaged. Copy the folder again."
        ) from error
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        differing = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
        name = differing[0]
        raise FormatError(
            f"{path}: expected {name} of shape {expected.get(name, 'none')}, got {found.get(name, 'none')} "
            f"({len(differing)} tensors differ). The weights belong to another config.json. Copy the folder again."
        )
    _check_finite(tensors, path)
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def _check_finite(tensors: dict[str, Tensor], path: Path) -> None:
    """Refuse weights that hold NaN or infinity."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise FormatError(
                f"{path}: expected finite weights, got NaN or infinity in {name}. The training diverged or the file "
                "is damaged. Train again with a smaller learning rate, or copy the file again."
            )
