"""Samples as pictures, while they denoise."""

import math
import time
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from modiff.generate.shards import to_uint8

MOST_PIXELS, SHARE = 256, 0.15
"""Longer side of a preview; how much of the time of a run previews may take."""


class Previews:
    """Pictures of samples, those of latents decoded, as often as SHARE allows; `seconds` is what making them took."""

    def __init__(self, pipe: DiffusionPipeline, count: int) -> None:
        self._pipe, self._count = pipe, count
        self._began, self._decodes = time.perf_counter(), True
        self.seconds = 0.0

    @torch.no_grad()
    def of(self, sample: Tensor) -> np.ndarray | None:
        """uint8 (N, H, W, C), or None where it is not time yet."""
        start = time.perf_counter()
        latent = getattr(self._pipe, "vae", None) is not None
        if latent and self.seconds > SHARE * (start - self._began):
            return None
        sample = sample[: self._count].detach()
        images = (self._decoded(sample) if latent else sample.float()) / 2 + 0.5
        smaller = min(1.0, MOST_PIXELS / max(images.shape[-2:]))
        images = torch.nn.functional.interpolate(images.clamp(0, 1), scale_factor=smaller, mode="area")
        picture = to_uint8(images.nan_to_num().permute(0, 2, 3, 1).cpu().numpy())
        self.seconds += time.perf_counter() - start
        return picture

    def _decoded(self, latents: Tensor) -> Tensor:
        """What the decoder makes of latents; three of their channels where their layout is not known here."""
        vae: Any = self._pipe.vae  # type: ignore[attr-defined]
        grid = _unpacked(latents)
        if self._decodes and grid.shape[1] == vae.config.get("latent_channels"):
            try:
                scaled = grid / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0)
                return vae.decode(scaled.to(vae.dtype), return_dict=False)[0].float()
            except (RuntimeError, ValueError, TypeError, AttributeError):  # a decoder with wishes of its own
                self._decodes = False
        colours = grid[:, [channel % grid.shape[1] for channel in range(3)]].float()
        low, high = colours.amin((1, 2, 3), keepdim=True), colours.amax((1, 2, 3), keepdim=True)
        return 2 * (colours - low) / (high - low).clamp(min=1e-6) - 1


def _unpacked(latents: Tensor) -> Tensor:
    """(N, C, H, W): of tokens of 2 x 2 latent pixels on a square (Flux), or of the first frame."""
    if latents.dim() == 3:
        side = math.isqrt(latents.shape[1])
        if side * side != latents.shape[1] or latents.shape[2] % 4:
            return latents.transpose(1, 2).unsqueeze(-1)
        grid = latents.view(len(latents), side, side, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return grid.reshape(len(latents), -1, 2 * side, 2 * side)
    return latents[:, :, 0] if latents.dim() == 5 else latents
