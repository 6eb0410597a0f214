"""Inception-v3 features from a file that the user has: a state dict, or the public TorchScript program.

Results of these two extractors are the only ones that may be called FID, sFID, KID and IS.
"""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from modiff.errors import ConfigError, FormatError
from modiff.evaluate.features.extractor import Features, check_images, fingerprint, first_line, load_weights
from modiff.evaluate.features.network import DIMENSION, LOGITS, SIDE, InceptionNetwork

Convention = Literal["tensorflow", "pytorch_fid"]

PUBLIC_SHA256 = "6726825d"
"""How the sha256 of the public file begins; its name, pt_inception-2015-12-05-6726825d.pth, says so."""
_PIXELS: dict[Convention, str] = {
    "tensorflow": "Images are resized as by TensorFlow 1 and scaled by (x - 128) / 128.",
    "pytorch_fid": "Images are resized by torch's bilinear and scaled by x / 127.5 - 1, as in pytorch-fid.",
}
_GET_DICT = "Give the public file pt_inception-2015-12-05-6726825d.pth, or one made from it; ImageNet weights of 1000 \
classes are not those of FID."
_GET_PROGRAM = "Give the public file inception-2015-12-05.pt."


class Inception:
    """Features of the published Inception-v3, with the pixels prepared in one of the two known ways.

    pooled: 2048 averages after the last block. probabilities: softmax over 1008 logits without their bias, as in the
    published Inception score. spatial: the sFID convention, 2023 numbers; see `spatial_rows`.

    Args:
        file: a state dict, .safetensors or a torch file (read with weights_only, so it cannot run code).
        convention: "tensorflow" resizes to 299 as TensorFlow 1 did and scales by (x - 128) / 128, as the original
            graph, the ADM suite and torch-fidelity do; "pytorch_fid" resizes with torch's bilinear and scales by
            x / 127.5 - 1. Each gives an FID that compares within its convention only.
        device: where it runs; features come back to the CPU.
    Raises: FormatError if the file is missing, damaged or of another network; ConfigError for another convention.
    Cost: 5.7 GMAC an image.
    """

    dimension = DIMENSION

    def __init__(
        self, file: str | Path, *, convention: Convention = "tensorflow", device: str | torch.device = "cpu"
    ) -> None:
        if convention not in _PIXELS:
            raise ConfigError(
                f"Inception: expected the convention 'tensorflow' or 'pytorch_fid', got {convention!r}. It says how "
                "images are resized and scaled. Use 'tensorflow'."
            )
        path = Path(file)
        if is_program(path):
            raise FormatError(
                f"{path}: expected a state dict of Inception-v3, got a TorchScript file, which holds a program. Open "
                "it with ScriptedInception."
            )
        with torch.device("meta"):
            network = InceptionNetwork()
        load_weights(network, path, _GET_DICT)
        self._network = network.to(device)
        self._device = torch.device(device)
        self._convention: Convention = convention
        self.fingerprint = fingerprint(path)
        self.name = f"inception-v3:{self.fingerprint}:{convention}"

    @property
    def note(self) -> str:
        """What to say with the results: which weights, and how pixels are prepared."""
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
        if self._convention == "tensorflow":
            pixels = (tensorflow_resize(pixels, SIDE) - 128) / 128
        else:
            pixels = functional.interpolate(pixels, size=(SIDE, SIDE), mode="bilinear", align_corners=False) / 127.5 - 1
        pooled, spatial, logits = self._network(pixels)
        return Features(*(rows.cpu() for rows in (pooled, spatial, logits.softmax(1))))


class ScriptedInception:
    """Features of the public TorchScript export of the same network, which resizes and scales images itself.

    It is called on uint8 images (N, 3, H, W): with return_features=True it must give (N, 2048), with
    no_output_bias=True probabilities (N, 1008). It keeps no positions, so there is no spatial distance.
    A TorchScript file holds a program. It runs in torch's interpreter, without access to Python, but give only files
    that you trust.

    Args:
        file: the TorchScript file.
        device: where it runs; features come back to the CPU.
    Raises: FormatError if the file is missing, damaged, or is not called like this.
    Cost: twice 5.7 GMAC an image, since a call gives features or probabilities; one image at the start.
    """

    dimension = DIMENSION

    def __init__(self, file: str | Path, *, device: str | torch.device = "cpu") -> None:
        path = Path(file)
        self._device = torch.device(device)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # torch's, of TorchScript itself
                self._module = torch.jit.load(path, map_location=self._device).eval()
            pooled, _, probabilities = self(torch.zeros(1, SIDE, SIDE, 3, dtype=torch.uint8))
        except (OSError, RuntimeError, ValueError, AttributeError, TypeError) as error:
            raise FormatError(
                f"{path}: expected a TorchScript program for uint8 images with return_features and no_output_bias, got "
                f"{first_line(error)}. The file is missing, damaged or of another network. {_GET_PROGRAM}"
            ) from error
        total = float(probabilities.sum())
        if (pooled.shape, probabilities.shape) != ((1, DIMENSION), (1, LOGITS)) or abs(total - 1) > 1e-3:
            raise FormatError(
                f"{path}: expected features (1, {DIMENSION}) and probabilities (1, {LOGITS}) that sum to 1, got "
                f"{tuple(pooled.shape)} and {tuple(probabilities.shape)} with a sum of {total:.4g}. It is another "
                f"network. {_GET_PROGRAM}"
            )
        self.fingerprint = fingerprint(path)
        self.name = f"inception-v3:{self.fingerprint}:torchscript"
        self.note = (
            f"Inception-v3 from a TorchScript file of sha256 {self.fingerprint}..., which resizes and scales images "
            "itself: the results compare with published ones only if it is the public one."
        )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Features of uint8 images (N, H, W, C); grey ones are repeated to three channels.

        Raises: ConfigError for other images.
        """
        check_images(images, "ScriptedInception")
        pixels = images.to(self._device).permute(0, 3, 1, 2).expand(-1, 3, -1, -1).contiguous()
        pooled, probabilities = self._module(pixels, return_features=True), self._module(pixels, no_output_bias=True)
        return Features(pooled.float().cpu(), None, probabilities.float().cpu())


def is_program(path: Path) -> bool:
    """Whether a file is TorchScript: a zip archive with code in it."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def tensorflow_resize(images: Tensor, size: int) -> Tensor:
    """Images (N, C, H, W), float, to (N, C, size, size), as `tf.image.resize_bilinear(align_corners=False)` did.

    Output pixel i is taken at i * H / size: pixel corners are aligned at the top left and not at the bottom right,
    unlike `interpolate(..., align_corners=False)` of torch, which takes it at (i + 1/2) H / size - 1/2. Beyond the last
    pixel the border is repeated; nothing is smoothed before shrinking.

    >>> tensorflow_resize(torch.tensor([[[[0.0, 2.0], [0.0, 2.0]]]]), 4)[0, 0, 0].tolist()
    [0.0, 1.0, 2.0, 2.0]
    """
    for dim in (3, 2):
        length = images.shape[dim]
        position = torch.arange(size, dtype=images.dtype, device=images.device) * (length / size)
        lower = position.long().clamp_max(length - 1)
        share = (position - lower).view(-1, *[1] * (3 - dim))
        low = images.index_select(dim, lower)
        images = low + (images.index_select(dim, (lower + 1).clamp_max(length - 1)) - low) * share
    return images
