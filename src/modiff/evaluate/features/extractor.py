"""What a feature extractor is, and weights files that are checked before use."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from modiff.config import check
from modiff.errors import FormatError
from modiff.files import reading


class Features(NamedTuple):
    """Of N images, float32 on the CPU, rows in the order of the images.

    pooled: (N, D), for Frechet and kernel distance, precision and recall.
    spatial: (N, D2) as `spatial_rows` makes them, or None if the extractor keeps no positions.
    probabilities: (N, K) of K classes, or None if it does not classify.
    """

    pooled: Tensor
    spatial: Tensor | None
    probabilities: Tensor | None


class FeatureExtractor(Protocol):
    """Turns images into feature vectors; the same image gives the same row in any batch, up to float32 rounding.

    name: goes into the names of all results, so it tells which weights these are. dimension: D. note: what to say with
    every result, such as the weights' origin, or None.
    """

    name: str
    dimension: int
    note: str | None

    def __call__(self, images: Tensor) -> Features:
        """Features of images, uint8 (N, H, W, C) in [0, 255], C 1 or 3."""
        ...


def check_images(images: Tensor, where: str) -> None:
    """Raise a ConfigError unless these are uint8 images (N, H, W, C) with 1 or 3 channels."""
    good = images.dtype == torch.uint8 and images.ndim == 4 and images.numel() > 0 and images.shape[3] in (1, 3)
    why = "Images come as they are saved, channels last. Round them to bytes first."
    check(where, (tuple(images.shape), images.dtype), good, "uint8 images (N, H, W, 1 or 3)", why)


def joined(batches: Sequence[Features]) -> Features:
    """The features of several batches as those of one."""
    columns = zip(*batches, strict=True)
    return Features(*(None if any(rows is None for rows in column) else torch.cat(column) for column in columns))


def file_digest(path: Path) -> str:
    """The first 8 hexadecimal digits of a file's sha256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:8]


def load_weights(network: nn.Module, path: Path, advice: str) -> None:
    """Load a .safetensors or torch file into a network, floats as float32; batch norms' counters may be missing.

    A torch file is read with weights_only, so it cannot run code. advice: what to type where the file is wrong.
    Raises: FormatError if it is missing, damaged, not finite, or has other names or shapes than the network.
    """
    with reading(path, "a weights file", advice):
        tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
            raise TypeError(f"{type(tensors).__name__} where names and tensors were expected, such as a checkpoint")
    here, there = ({name: tuple(t.shape) for name, t in state.items() if not name.endswith("num_batches_tracked")}
                   for state in (network.state_dict(), tensors))  # fmt: skip
    differing = sorted(name for name in {*here, *there} if here.get(name) != there.get(name))
    if differing:
        name = differing[0]
        raise FormatError(
            f"{path}: expected {name} of shape {here.get(name, 'none')}, got {there.get(name, 'none')} "
            f"({len(differing)} tensors differ). The weights are those of another network. {advice}"
        )
    check_finite_weights(tensors, path, advice)
    floats = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    network.load_state_dict(floats, strict=False, assign=True)  # not strict: counters; all other names were checked
    network.eval().requires_grad_(False)


def check_finite_weights(tensors: dict[str, Tensor], path: Path, advice: str) -> None:
    """Raise a FormatError for weights that hold NaN or infinity."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise FormatError(
                f"{path}: expected finite weights, got NaN or infinity in {name}. The training diverged or the file "
                f"is damaged. {advice}"
            )
