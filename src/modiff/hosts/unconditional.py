"""Unconditional pixel U-Nets with any sampler: diffusers' own pipelines for them know one family of schedulers each."""

from __future__ import annotations

import inspect

import torch
from diffusers import DDPMPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class UnconditionalPipeline(DDPMPipeline):
    """x_T ~ N(0, sigma_T²), then x <- scheduler.step(unet(scale(x), t)) over all timesteps."""

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[object]:
        """Generate `batch_size` images, as `DDPMPipeline` does; with `output_type="np"` (N, H, W, C) in [0, 1].

        Args:
            generator: one for all, or one per image.
        """
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch_size, self.unet.config.in_channels, height, width)
        image = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=self.unet.dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        image = image * self.scheduler.init_noise_sigma
        takes_noise = "generator" in inspect.signature(self.scheduler.step).parameters
        randomness = {"generator": generator} if takes_noise else {}
        for t in self.progress_bar(self.scheduler.timesteps):
            scaled = self.scheduler.scale_model_input(image, t)
            image = self.scheduler.step(self.unet(scaled, t).sample, t, image, **randomness).prev_sample
        image = (image / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            image = image.cpu().permute(0, 2, 3, 1).numpy()
            if output_type == "pil":
                image = self.numpy_to_pil(image)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=image) if return_dict else (image,)
