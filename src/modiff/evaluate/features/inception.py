"""Inception-v3 features from a state dict that the user has: only their results may be called FID, sFID, KID, IS."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from modiff.evaluate.features.extractor import Features, check_images, file_digest, load_weights
from modiff.evaluate.features.network import DIMENSION, SIDE, InceptionNetwork

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
        self.fingerprint = file_digest(path)
        self.name = f"inception-v3:{self.fingerprint}:tensorflow"

    @property
    def note(self) -> str:
        """What to say with the results: which weights, and how pixels are prepared."""
        if self.fingerprint == PUBLIC_SHA256:
            return f"Inception-v3, the public weights file. {_PIXELS}"
        return (
            f"The weights file is not byte for byte the public one (sha256 {self.fingerprint}..., public "
            f"{PUBLIC_SHA256}...): the results compare with published ones only if the weights are the same. {_PIXELS}"
        )

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
