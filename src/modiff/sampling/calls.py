"""How pipelines are called and what they return: generators, callbacks, noise of a pixel U-Net's size, its images."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from modiff.config import check, check_count

Callback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]
"""(pipe, step, timestep, tensors by name) -> tensors that take their place, by name."""
Generators = torch.Generator | list[torch.Generator] | None
"""One for all images, or one for each."""


def pixel_noise(pipe: Any, batch_size: int, generator: Generators, output_type: str) -> Tensor:
    """x_T ~ N(0, 1) of a pipeline's U-Net. Raises: ConfigError for what gives no images, before they are drawn."""
    where = type(pipe).__name__
    check_count(f"{where}.batch_size", batch_size, "None samples nothing.")
    check(f"{where}.output_type", output_type, output_type in ("pil", "np", "pt"), "pil, np or pt", "Use pil.")
    count = len(generator) if isinstance(generator, list) else 1
    check(f"{where}.generator", count, count in (1, batch_size), f"one, or one for each of {batch_size} images",
          "Each draws the noise of its image.")  # fmt: skip
    size = pipe.unet.config.sample_size
    shape = (batch_size, pipe.unet.config.in_channels, *((size, size) if isinstance(size, int) else size))
    return randn_tensor(shape, generator=generator, device=pipe._execution_device, dtype=pipe.unet.dtype)


def pixel_images(pipe: Any, sample: Tensor, output_type: str) -> Any:
    """Images in [0, 1] of a sample in [-1, 1]: "pt" (N, C, H, W), "np" (N, H, W, C) float32, or "pil"."""
    pipe.maybe_free_model_hooks()
    images = (sample / 2 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return images
    arrays = images.cpu().permute(0, 2, 3, 1).float().numpy()
    return pipe.numpy_to_pil(arrays) if output_type == "pil" else arrays
