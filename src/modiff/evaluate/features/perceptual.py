"""LPIPS: a learned distance between two images."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from modiff.errors import ConfigError
from modiff.evaluate.features.optional import optional_import
from modiff.evaluate.features.protocol import check_images
from modiff.evaluate.metrics.paired import check_same_shape

Network = Literal["alex", "vgg", "squeeze"]


class PerceptualDistance:
    """LPIPS (Zhang et al. 2018, arXiv:1801.03924) of pairs of images, by the package `lpips` and its version 0.1.

    `lpips` needs torchvision, and downloads the network's weights at the first use.

    Args:
        network: "alex" is the authors' choice for judging images; values of different networks are not comparable.
        device: where it runs.
    Raises: ConfigError if lpips or torchvision is missing or does not load, or for another network.

    """

    def __init__(self, network: Network = "alex", *, device: str | torch.device = "cpu") -> None:
        if network not in ("alex", "vgg", "squeeze"):
            raise ConfigError(
                f"PerceptualDistance: expected the network 'alex', 'vgg' or 'squeeze', got {network!r}. LPIPS was "
                "trained for these. Use 'alex'."
            )
        optional_import("torchvision", "PerceptualDistance")  # first: lpips's own error would hide the reason
        lpips = optional_import("lpips", "PerceptualDistance")
        self.name = f"LPIPS({network})"
        self._device = torch.device(device)
        self._model = lpips.LPIPS(net=network, version="0.1", verbose=False).to(self._device).eval()

    @torch.no_grad()
    def __call__(self, images: Tensor, reference: Tensor) -> Tensor:
        """The distance of each pair, float32 (N,): 0 for equal images, larger is worse.

        Args:
            images, reference: uint8 (N, H, W, C) of one shape, at least 32 pixels a side; grey ones are repeated to
                three channels.
        Raises: ConfigError for other images.
        """
        for given in (images, reference):
            check_images(given, "PerceptualDistance")
        check_same_shape(images, reference, "PerceptualDistance")
        if min(images.shape[1:3]) < 32:
            raise ConfigError(
                f"PerceptualDistance: expected images of at least 32 pixels a side, got {tuple(images.shape)}. The "
                "network halves them five times. Use ssim or psnr for smaller ones."
            )
        return self._model(self._scaled(images), self._scaled(reference)).flatten().float().cpu()

    def _scaled(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1]."""
        return images.to(self._device).permute(0, 3, 1, 2).float().expand(-1, 3, -1, -1) / 127.5 - 1
