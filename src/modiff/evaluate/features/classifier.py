"""A small image classifier: offline feature extractor of the metrics, and the judge of what a diffusion model draws.

A folder holds `config.json` (format version, architecture) and `model.safetensors` (float16 weights).
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from modiff.config import check
from modiff.evaluate.features.extractor import Features, check_finite_weights, check_images, load_weights
from modiff.evaluate.metrics.frechet import spatial_rows
from modiff.files import read_json, reading, write_atomically, write_json

_FORMAT_VERSION = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"


class Classifier(nn.Module):
    """Blocks of 3x3 convolution, 2x2 maximum (not in the last), batch norm and ReLU; averaged, then one linear layer.

    Args:
        channels: channels of each block; the last is the number of features D.
        layers: convolutions in each block, with batch norm and ReLU each; the maximum follows the last one.

    >>> Classifier(channels=(4, 8), classes=3)(torch.zeros(2, 1, 32, 32)).shape
    torch.Size([2, 3])
    """

    def __init__(
        self, channels: Sequence[int] = (16, 32, 64, 128), image_channels: int = 1, classes: int = 10, layers: int = 1
    ) -> None:
        super().__init__()
        widths = (image_channels, *channels)
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
        expected = f"float images (N, {self.image_channels}, H, W) of at least {smallest} pixels a side"
        got, why = (tuple(images.shape), images.dtype), "For uint8 images give `images.float() / 127.5 - 1`."
        check("Classifier", got, fits and images.is_floating_point(), expected, why)
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
    check_finite_weights(tensors, folder / WEIGHTS, "Train again with a smaller learning rate.")
    config = {name: getattr(model, name) for name in ("channels", "image_channels", "classes", "layers")}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / WEIGHTS, lambda file: file.write(save(tensors)))
    write_json(folder / CONFIG, {"format_version": _FORMAT_VERSION, **config})


def load_classifier(folder: str | Path) -> Classifier:
    """The classifier of `folder` in evaluation mode, on the CPU, with float32 weights that ask for no gradient.

    Raises: FormatError if the folder, its config or its weights are missing, damaged or of another version.
    """
    what, advice = f"the config of a classifier, format_version {_FORMAT_VERSION}", "Give one of save_classifier."
    config = read_json(Path(folder) / CONFIG, what, advice)
    with reading(Path(folder) / CONFIG, what, advice):
        version = config.pop("format_version", None)
        if version != _FORMAT_VERSION:
            raise ValueError(f"format_version {version!r}")
        model = Classifier(**config)
    load_weights(model, Path(folder) / WEIGHTS, "Copy the folder again.")
    return model


class ClassifierFeatures:
    """A `Classifier` as feature extractor; results are named after it and compare models of its own data set only.

    pooled: what its last layer sees. probabilities: softmax of its logits. spatial: `spatial_rows` of the maps after
    block max(1, number of blocks // 2) and its ReLU.
    """

    def __init__(self, model: Classifier, name: str, *, device: str | torch.device = "cpu") -> None:
        self.name, self.dimension, self.note = name, model.channels[-1], None
        self._device = torch.device(device)
        self._model = model.to(self._device).eval()
        ends = [index for index, module in enumerate(model.blocks, 1) if isinstance(module, nn.ReLU)]
        self._middle = ends[max(len(ends) // 2, 1) - 1]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Features of uint8 images (N, H, W, C), scaled to [-1, 1] as in training.

        Raises: ConfigError for other images, another number of channels, or images too small for the blocks.
        """
        check_images(images, self.name)
        pixels = images.to(self._device).permute(0, 3, 1, 2).float() / 127.5 - 1
        pooled = self._model.features(pixels)
        maps = self._model.blocks[: self._middle](pixels)
        probabilities = self._model.head(pooled).softmax(1)
        return Features(*(rows.float().cpu() for rows in (pooled, spatial_rows(maps), probabilities)))
