"""Inception-v3 features from a TorchScript file, which brings its own resize and scaling."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor

from modiff.errors import FormatError
from modiff.evaluate.features.inception import fingerprint
from modiff.evaluate.features.inception_network import DIMENSION, LOGITS, SIDE
from modiff.evaluate.features.messages import first_line
from modiff.evaluate.features.protocol import Features, check_images

_GET_IT = "Give the public file inception-2015-12-05.pt."


class ScriptedInception:
    """Features of the public TorchScript export of the same network, inception-2015-12-05.pt.

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

    def __init__(self, file: str | Path, *, device: str | torch.device = "cpu") -> None:
        path = Path(file)
        self._device = torch.device(device)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # torch's, of TorchScript itself
                self._module = torch.jit.load(path, map_location=self._device).eval()
        except (OSError, RuntimeError, ValueError) as error:
            raise FormatError(
                f"{path}: expected a TorchScript file, got {first_line(error)}. The file is missing, "
                f"damaged or a state dict, which Inception opens. {_GET_IT}"
            ) from error
        self.fingerprint = fingerprint(path)
        self._check(path)

    @property
    def name(self) -> str:
        """With the first digits of the file's sha256."""
        return f"inception-v3:{self.fingerprint}:torchscript"

    @property
    def dimension(self) -> int:
        """2048."""
        return DIMENSION

    @property
    def note(self) -> str:
        """What to say beside the results: which weights, and who prepares the pixels."""
        return (
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
        pooled, probabilities = self._run(pixels)
        return Features(pooled.float().cpu(), None, probabilities.float().cpu())

    def _run(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self._module(pixels, return_features=True), self._module(pixels, no_output_bias=True)

    @torch.no_grad()
    def _check(self, path: Path) -> None:
        """One black image through the program."""
        try:
            pooled, probabilities = self._run(torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8, device=self._device))
            shapes = tuple(pooled.shape), tuple(probabilities.shape)
            total = float(probabilities.sum())
        except (RuntimeError, AttributeError, TypeError) as error:
            raise FormatError(
                f"{path}: expected a program for uint8 images with return_features and no_output_bias, got "
                f"{first_line(error)}. It is another network. {_GET_IT}"
            ) from error
        if shapes != ((1, DIMENSION), (1, LOGITS)) or abs(total - 1) > 1e-3:
            raise FormatError(
                f"{path}: expected features (1, {DIMENSION}) and probabilities (1, {LOGITS}) that sum to 1, got "
                f"{shapes[0]} and {shapes[1]} with a sum of {total:.4g}. It is another network. {_GET_IT}"
            )
