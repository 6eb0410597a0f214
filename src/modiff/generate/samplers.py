"""Give a pipeline another sampler by name; a pipeline that lets pixel U-Nets use any of them."""

import inspect
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DiffusionPipeline, ImagePipelineOutput

from modiff.config import check
from modiff.errors import StateError
from modiff.hosts.host import is_attached
from modiff.sampling import ddm
from modiff.sampling.calls import Generators, pixel_images, pixel_noise


class Sampler(NamedTuple):
    """A scheduler of diffusers or of `modiff.sampling`, and the settings that make it this sampler.

    flow: it can follow a flow-matching model. noise: it can follow a model that predicts noise, the sample or v.
    """

    kind: str
    settings: dict[str, Any] = {}  # noqa: RUF012  # read only
    flow: bool = False
    noise: bool = True


_SECOND_ORDER = {"algorithm_type": "dpmsolver++", "solver_order": 2}
SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler("DDIMScheduler"),
    "ddpm": Sampler("DDPMScheduler"),
    "pndm": Sampler("PNDMScheduler", {"skip_prk_steps": True}),
    "dpmsolver++": Sampler("DPMSolverMultistepScheduler", _SECOND_ORDER, flow=True),
    "dpmsolver++2s": Sampler("DPMSolverSinglestepScheduler", _SECOND_ORDER | {"lower_order_final": True}),
    "sde-dpmsolver++": Sampler("DPMSolverMultistepScheduler", _SECOND_ORDER | {"algorithm_type": "sde-dpmsolver++"}),
    "euler": Sampler("EulerDiscreteScheduler"),
    "heun": Sampler("HeunDiscreteScheduler"),
    "ddm": Sampler("DDMScheduler"),
    "unipc": Sampler("UniPCMultistepScheduler", flow=True),
    "flow-euler": Sampler("FlowMatchEulerDiscreteScheduler", flow=True, noise=False),
}
"""pndm is its linear multistep form (PLMS), as most pipelines use it; dpmsolver++ is 2M."""


def usual_sampler(pipe: DiffusionPipeline) -> str | None:
    """DDIM, or None, which is the pipeline's own, for a model that was trained for flow matching."""
    saved = pipe.scheduler  # tells what the model was trained for
    return None if type(saved).__name__.startswith("FlowMatch") or saved.config.get("use_flow_sigmas") else "ddim"


def set_scheduler(pipe: DiffusionPipeline, name: str) -> DiffusionPipeline:
    """Let a pipeline sample with the scheduler `name` of SAMPLERS, built from the noise schedule of its present one.

    Returns: the pipeline to call. It is `pipe` itself, but for DDIMPipeline and DDPMPipeline, whose loops serve one
        family of schedulers only: then a pipeline with the same U-Net, and `pipe` keeps its own scheduler.
    Raises: ConfigError for an unknown name, or one that cannot follow what the model was trained to predict; StateError
        after `modiff.apply`.
    """
    if is_attached(pipe):
        raise StateError(
            f"set_scheduler: expected a plain pipeline, got {type(pipe).__name__} with modulated layers. It may be "
            "replaced by another object, which would not know them. Choose the scheduler before modiff.apply."
        )
    check("scheduler", name, name in SAMPLERS, f"one of {', '.join(SAMPLERS)}", "Pick one of them.")
    sampler, config = SAMPLERS[name], pipe.scheduler.config
    flow = usual_sampler(pipe) is None
    fitting = [n for n, s in SAMPLERS.items() if (s.flow if flow else s.noise)]
    why = f"The model was trained for {'flow matching' if flow else 'a noise schedule'}. Pick one of them."
    check("scheduler", name, name in fitting, f"one of {', '.join(fitting)} for {type(pipe).__name__}", why)
    settings = dict(sampler.settings)
    if flow:
        shift = config.get("shift", config.get("flow_shift", 1.0))
        solver = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
        settings |= {"shift": shift} if name == "flow-euler" else solver
    home = diffusers if hasattr(diffusers, sampler.kind) else ddm
    scheduler = getattr(home, sampler.kind).from_config(config, **settings)
    if isinstance(pipe, (DDIMPipeline, DDPMPipeline)):
        kind = DDIMPipeline if name == "ddim" else UnconditionalPipeline
        other = kind(unet=pipe.unet, scheduler=scheduler)
        other.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
        return other
    pipe.scheduler = scheduler
    return pipe


def savable(sampling: DiffusionPipeline, pipe: DiffusionPipeline) -> DiffusionPipeline:
    """What to save for a pipeline that `set_scheduler` made of `pipe`: a class of diffusers with the same network.

    diffusers has none that samples with any scheduler, so it is `pipe`; DDPMPipeline where the scheduler is corrected,
    as the samplers that can be need neither a scaled input nor scaled noise.
    """
    if not isinstance(sampling, UnconditionalPipeline):
        return sampling
    return DDPMPipeline(sampling.unet, sampling.scheduler) if "correction" in sampling.scheduler.config else pipe


class UnconditionalPipeline(DDPMPipeline):
    """Unconditional pixel U-Nets with any scheduler; diffusers' own pipelines know one family of them each.

    x_T ~ N(0, sigma_T²), then x <- scheduler.step(unet(scale(x), t)) over all timesteps.
    """

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        num_inference_steps: int = 50,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[object]:
        """Generate `batch_size` images, as `DDPMPipeline` does; with `output_type="np"` (N, H, W, C) in [0, 1]."""
        image = pixel_noise(self, batch_size, generator, output_type)
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        image = image * self.scheduler.init_noise_sigma
        random = "generator" in inspect.signature(self.scheduler.step).parameters
        noise = {"generator": generator} if random else {}
        for t in self.progress_bar(self.scheduler.timesteps):
            scaled = self.scheduler.scale_model_input(image, t)
            image = self.scheduler.step(self.unet(scaled, t).sample, t, image, **noise).prev_sample
        image = pixel_images(self, image, output_type)
        return ImagePipelineOutput(images=image) if return_dict else (image,)
