"""Inception-v3 features from a state dict that the user has.

Results of this extractor and of `ScriptedInception` are the only ones that may be called FID, sFID, KID and IS.
"""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from modiff.errors import ConfigError, FormatError
from modiff.evaluate.features.inception_network import DIMENSION, SIDE, InceptionNetwork
from modiff.evaluate.features.messages import first_line
from modiff.evaluate.features.protocol import Features, check_images
from modiff.evaluate.features.tensorflow_resize import tensorflow_resize

Convention = Literal["tensorflow", "pytorch_fid"]

PUBLIC_SHA256 = "6726825d"
"""How the sha256 of the public file begins; its name, pt_inception-2015-12-05-6726825d.pth, says so."""

_PIXELS: dict[Convention, str] = {
    "tensorflow": "Images are resized as by TensorFlow 1 and scaled by (x - 128) / 128.",
    "pytorch_fid": "Images are resized by torch's bilinear and scaled by x / 127.5 - 1, as in pytorch-fid.",
}
_GET_IT = "Give the public file pt_inception-2015-12-05-6726825d.pth, or one made from it."


class Inception:
    """Features of the published Inception-v3, with the pixels prepared as one of the two known ways.

    pooled: 2048 averages after the last block. probabilities: softmax over 1008 logits without their bias, as in the
    published Inception score. spatial: the sFID convention, 2023 numbers; see `spatial_rows`.

    Args:
        file: a state dict, .safetensors or a torch file (read with weights_only, so it cannot run code).
        convention: "tensorflow" resizes to 299 as TensorFlow 1 did and scales by (x - 128) / 128, as the original
            graph, the ADM suite and torch-fidelity do; "pytorch_fid" resizes with torch's bilinear (half pixel centres,
            align_corners=False) and scales by x / 127.5 - 1, as pytorch-fid does. Both give an FID, and another one:
            compare within one convention only.
        device: where it runs; features come back to the CPU.
    Raises: FormatError if the file is missing, damaged or of another network; ConfigError for another convention.
    Cost: 5.7 GMAC an image.
    """

    def __init__(
        self, file: str | Path, *, convention: Convention = "tensorflow", device: str | torch.device = "cpu"
    ) -> None:
        if convention not in ("tensorflow", "pytorch_fid"):
            raise ConfigError(
                f"Inception: expected the convention 'tensorflow' or 'pytorch_fid', got {convention!r}. It says how "
                "images are resized and scaled. Use 'tensorflow'."
            )
        path = Path(file)
        tensors = _read(path)
        _check(path, tensors)
        with torch.device("meta"):
            network = InceptionNetwork()
        # Not strict: the batch norms' counters may be missing; all other names were checked.
        network.load_state_dict(tensors, strict=False, assign=True)
        self._network = network.float().to(device).eval().requires_grad_(False)
        self._device = torch.device(device)
        self._convention: Convention = convention
        self.fingerprint = fingerprint(path)

    @property
    def name(self) -> str:
        """With the convention and the first digits of the file's sha256."""
        return f"inception-v3:{self.fingerprint}:{self._convention}"

    @property
    def dimension(self) -> int:
        """2048."""
        return DIMENSION

    @property
    def note(self) -> str:
        """What to say beside the results: which weights, and how pixels are prepared."""
        if self.fingerprint == PUBLIC_SHA256:
            return f"Inception-v3, the public weights file. {_PIXELS[self._convention]}"
        return (
            f"The weights file is not byte for byte the public one (sha256 {self.fingerprint}..., public "
            f"{PUBLIC_SHA256}...): the results compare with published ones only if the weights are the same. "
            f"{_PIXELS[self._convention]}"
        )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Features of uint8 images (N, H, W, C); grey ones are repeated to three channels.

        Raises: ConfigError for other images.
        """
        check_images(images, "Inception")
        pixels = images.to(self._device).permute(0, 3, 1, 2).float().expand(-1, 3, -1, -1)
        pooled, spatial, logits = self._network(_prepared(pixels, self._convention))
        return Features(*(part.cpu() for part in (pooled, spatial, logits.softmax(1))))


def fingerprint(path: Path) -> str:
    """The first 8 hexadecimal digits of a file's sha256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:8]


def _prepared(pixels: Tensor, convention: Convention) -> Tensor:
    """Pixels in [0, 255], (N, 3, H, W), as the network wants them."""
    if convention == "tensorflow":
        return (tensorflow_resize(pixels, SIDE) - 128) / 128
    resized = functional.interpolate(pixels, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return resized / 127.5 - 1


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name."""
    if _is_program(path):
        raise FormatError(
            f"{path}: expected a state dict of Inception-v3, got a TorchScript file. It holds a program beside the "
            "weights. Open it with ScriptedInception."
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, SafetensorError, pickle.UnpicklingError) as error:
        raise FormatError(
            f"{path}: expected a state dict of Inception-v3, got {first_line(error)}. The file is missing, "
            f"damaged or something else. {_GET_IT}"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise FormatError(
            f"{path}: expected a state dict, names and tensors, got {type(found).__name__}. It may be a training "
            f"checkpoint. {_GET_IT}"
        )
    return found


def _is_program(path: Path) -> bool:
    """TorchScript files are zip archives with code in them."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def _check(path: Path, tensors: dict[str, Tensor]) -> None:
    """Refuse another network's tensors; BatchNorm's counters may be there or not."""
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in InceptionNetwork().state_dict().items() if _matters(name)}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items() if _matters(name)}
    differing = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    if differing:
        name = "fc.weight" if "fc.weight" in differing else differing[0]
        why = (
            "These are ImageNet weights of 1000 classes, another network than that of FID."
            if found.get("fc.weight") == (1000, DIMENSION)
            else "It is another network."
        )
        raise FormatError(
            f"{path}: expected {name} of shape {expected.get(name, 'none')}, got {found.get(name, 'none')} "
            f"({len(differing)} tensors differ). {why} {_GET_IT}"
        )
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise FormatError(
                f"{path}: expected finite weights, got NaN or infinity in {name}. The file is damaged. {_GET_IT}"
            )


def _matters(name: str) -> bool:
    return not name.endswith("num_batches_tracked")
