"""What a feature extractor is, the features of a whole set, and weights files that are checked before use."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from modiff.errors import ConfigError, FormatError

_BATCH = 64


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
    good = isinstance(images, Tensor) and images.dtype == torch.uint8 and images.ndim == 4 and images.numel() > 0
    if not good or images.shape[3] not in (1, 3):
        got = f"{tuple(images.shape)} {images.dtype}" if isinstance(images, Tensor) else type(images).__name__
        raise ConfigError(
            f"{where}: expected a tensor of uint8 images (N, H, W, 1 or 3), got {got}. Images come as they are saved, "
            "channels last. Round them to bytes first, and give torch.from_numpy(images)."
        )


def extract(
    extractor: FeatureExtractor, batches: Iterable[np.ndarray | Tensor], *, batch_size: int = _BATCH
) -> Features:
    """The features of all images, uint8 arrays (n, H, W, C) of any n, in order.

    Raises: ConfigError if there are no images, or as the extractor.
    """
    rows = [extractor(images) for batch in batches for images in torch.as_tensor(batch).split(batch_size)]
    if not rows:
        raise ConfigError("extract: expected images, got none. The set is empty. Check the folder of the images.")
    return joined(rows)


def joined(batches: Sequence[Features]) -> Features:
    """The features of several batches as those of one."""
    columns = ([rows for rows in column if rows is not None] for column in zip(*batches, strict=True))
    pooled, *others = (torch.cat(rows) if len(rows) == len(batches) else None for rows in columns)
    return Features(cast("Tensor", pooled), *others)


def file_digest(path: Path) -> str:
    """The first 8 hexadecimal digits of a file's sha256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:8]


def first_line(error: BaseException) -> str:
    """What another library's error says in its first line, with its class.

    >>> first_line(ValueError("bad\\nand long"))
    'ValueError: bad'
    """
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def load_weights(network: nn.Module, path: Path, advice: str) -> None:
    """Load a .safetensors or torch file into a network, floats as float32; batch norms' counters may be missing.

    A torch file is read with weights_only, so it cannot run code. advice: what to type where the file is wrong.
    Raises: FormatError if it is missing, damaged, not finite, or has other names or shapes than the network.
    """
    try:
        tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, SafetensorError, pickle.UnpicklingError) as error:
        raise FormatError(
            f"{path}: expected a weights file, got {first_line(error)}. The file is missing, damaged or something "
            f"else. {advice}"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise FormatError(
            f"{path}: expected a state dict, names and tensors, got {type(tensors).__name__}. It may be a training "
            f"checkpoint. {advice}"
        )
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
