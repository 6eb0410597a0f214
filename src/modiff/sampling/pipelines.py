"""Pipelines of diffusers that sample in parallel: unconditional pixel U-Nets, and Stable Diffusion with guidance."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import DDPMPipeline, DiffusionPipeline, StableDiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from modiff.hosts import diffusers_host
from modiff.model.attach import attachment_of
from modiff.sampling.calls import Callback, Generators, pixel_images, pixel_noise
from modiff.sampling.parallel import ParallelSampler, Sampled, rows_of, spread
from modiff.sampling.window import along_window

diffusers_host()  # lets `from_pretrained` read folders of quantized networks


@dataclass
class ParallelPipelineOutput(BaseOutput):
    """Images, and what they took.

    images: as `ImagePipelineOutput` has them. iterations: batched evaluations. evaluations: rows in all of them, for
    each image.
    """

    images: Any
    iterations: int
    evaluations: int


def _sample(
    pipe: DiffusionPipeline, sampler: ParallelSampler, denoise: Callable[[nn.Module, Tensor, Tensor], Tensor],
    copies: Sequence[nn.Module], noise: Tensor, steps: int, eta: float, generator: Generators,
    callback: Callback | None = None,
) -> Sampled:  # fmt: skip
    """Sample with the pipeline's U-Net and its copies; what carries modiff is modulated along the window."""

    def advanced(done: int, timestep: Tensor, state: Tensor) -> Tensor | None:
        bar.update(done - bar.n)
        return None if callback is None else callback(pipe, done - 1, timestep, {"latents": state}).get("latents")

    networks = [pipe.unet, *copies]
    with ExitStack() as stack:
        for network in networks:
            if attachment_of(network) is not None:
                stack.enter_context(along_window(network))
        evaluators = [rows_of(partial(denoise, network), next(network.parameters()).device) for network in networks]
        evaluate = spread(evaluators) if copies else evaluators[0]
        bar = stack.enter_context(pipe.progress_bar(total=steps))
        return sampler(evaluate, noise, steps, generator=generator, advanced=advanced, eta=eta)


class ParallelPipeline(DDPMPipeline):
    """Unconditional pixel U-Nets, `parallel` steps in a batch: see `ParallelSampler`.

    fast = ParallelPipeline(unet=pipe.unet, scheduler=DDIMScheduler.from_config(pipe.scheduler.config))
    images = fast(num_inference_steps=50, parallel=10, tolerance=0.1).images
    """

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        num_inference_steps: int = 50,
        eta: float = 0.0,
        parallel: int = 10,
        tolerance: float = 0.1,
        copies: Sequence[nn.Module] = (),
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ParallelPipelineOutput | tuple[Any, int, int]:
        """Generate `batch_size` images, those of the sequential pipeline where the tolerance is 0.

        Args:
            eta: noise of DDIM. parallel: rows of the window. tolerance: as `ParallelSampler` has it.
            copies: of the U-Net on other devices; each evaluates its share of the rows.
            output_type: "pil", "np" (N, H, W, C) or "pt" (N, C, H, W), in [0, 1].
        Raises: ConfigError for a scheduler that is not served, or for settings out of range.
        """
        sampler = ParallelSampler(self.scheduler, parallel, tolerance)
        noise = pixel_noise(self, batch_size, generator, output_type)
        result = _sample(
            self, sampler, lambda unet, x, t: unet(x, t).sample, copies, noise, num_inference_steps, eta, generator
        )
        images = pixel_images(self, result.sample, output_type)
        output = ParallelPipelineOutput(images=images, iterations=result.iterations, evaluations=result.evaluations)
        return output if return_dict else output.to_tuple()


class ParallelStableDiffusionPipeline(StableDiffusionPipeline):
    """Text to image, `parallel` steps in a batch: see `ParallelSampler`. Guidance doubles the batch, as always.

    fast = ParallelStableDiffusionPipeline.from_pipe(pipe)
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        parallel: int = 10,
        tolerance: float = 0.1,
        copies: Sequence[nn.Module] = (),
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
    ) -> ParallelPipelineOutput | tuple[Any, int, int]:
        """As `StableDiffusionPipeline`; parallel, tolerance and copies as in `ParallelPipeline`.

        callback_on_step_end: called when the window has moved on, of {"latents": ...}, which what it returns replaces.
        Raises: ConfigError as there.
        """
        sampler = ParallelSampler(self.scheduler, parallel, tolerance)
        size = self.unet.config.sample_size
        sizes = (size, size) if isinstance(size, int) else size
        height, width = height or sizes[0] * self.vae_scale_factor, width or sizes[1] * self.vae_scale_factor
        self.check_inputs(prompt, height, width, None, negative_prompt, prompt_embeds, negative_prompt_embeds)
        device, guided = self._execution_device, guidance_scale > 1
        text, other = self.encode_prompt(
            prompt, device, num_images_per_prompt, guided, negative_prompt, prompt_embeds, negative_prompt_embeds
        )
        noise = self.prepare_latents(
            len(text), self.unet.config.in_channels, height, width, text.dtype, device, generator, latents
        )
        embeddings = torch.cat([other, text]) if guided else text

        def denoise(unet: nn.Module, x: Tensor, t: Tensor) -> Tensor:
            rows = embeddings.to(x.device).repeat_interleave(len(x) // len(text), 0)
            if not guided:
                return unet(x, t, encoder_hidden_states=rows).sample
            plain, prompted = unet(torch.cat([x, x]), torch.cat([t, t]), encoder_hidden_states=rows).sample.chunk(2)
            return plain + guidance_scale * (prompted - plain)

        result = _sample(
            self, sampler, denoise, copies, noise, num_inference_steps, eta, generator, callback_on_step_end
        )
        images = result.sample
        if output_type != "latent":
            images = self.vae.decode(images / self.vae.config.scaling_factor, return_dict=False)[0]
            images, flagged = self.run_safety_checker(images, device, text.dtype)
            shown = None if flagged is None else [not each for each in flagged]
            images = self.image_processor.postprocess(images, output_type=output_type, do_denormalize=shown)
        self.maybe_free_model_hooks()
        output = ParallelPipelineOutput(images=images, iterations=result.iterations, evaluations=result.evaluations)
        return output if return_dict else output.to_tuple()
