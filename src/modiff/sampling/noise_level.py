"""Noise estimation: a small network says how noisy a sample is, and the rest of the schedule starts from there."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import ConfigMixin, DDIMScheduler, DDPMPipeline, DDPMScheduler, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from modiff.config import check, check_count
from modiff.hosts import diffusers_host
from modiff.sampling.calls import Generators, pixel_images, pixel_noise
from modiff.sampling.levels import timestep_at

diffusers_host()  # lets `from_pretrained` read folders of quantized networks

Shape = Literal["linear", "fibonacci"]
Solver = Literal["bisection", "first_order"]
FIRST_BETA, LEAST_BETA = 1e-4, 1e-8
_FLOOR = 1e-4
"""Under every deviation of a channel, before its logarithm."""


class NoiseLevelEstimator(ModelMixin, ConfigMixin):
    """Says of y = sqrt(ab) y_0 + sqrt(1 - ab) eps, with y_0 like the images it was trained on, what ab is.

    Strided convolutions; of each of their outputs the mean and the logarithm of the deviation of every channel over the
    pixels; one linear layer. Made for images that a diffusion model sees, in [-1, 1]. `save_pretrained` and
    `from_pretrained` are those of diffusers; training/train_noise_level.py trains one in minutes.

    Args: in_channels: of the images. channels: of each convolution, which halves the image.
    """

    @register_to_config
    def __init__(self, in_channels: int = 1, channels: tuple[int, ...] = (16, 32, 64, 64)) -> None:
        super().__init__()
        widths = [in_channels, *channels]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(width, following, 3, stride=2, padding=1)
            for width, following in zip(widths[:-1], channels, strict=True)
        )
        self.head = nn.Linear(2 * sum(channels), 1)

    def forward(self, sample: Tensor) -> Tensor:
        """log(1 - ab) of each sample (N, C, H, W), what training compares: (N,)."""
        return nn.functional.logsigmoid(-self._logits(sample))

    @torch.no_grad()
    def levels(self, sample: Tensor) -> Tensor:
        """ab of each sample, in (0, 1): (N,). Raises: ConfigError for other channels, or images too small."""
        least = 2 ** len(self.convolutions)
        fits = sample.dim() == 4 and sample.shape[1] == self.config.in_channels and min(sample.shape[2:]) >= least
        expected = f"(N, {self.config.in_channels}, H, W) from {least} pixels"
        check("NoiseLevelEstimator", tuple(sample.shape), fits, expected,
              "It was trained on such images. Train one on yours with training/train_noise_level.py.")  # fmt: skip
        return self._logits(sample.to(self.head.weight)).sigmoid()

    def _logits(self, sample: Tensor) -> Tensor:
        pooled: list[Tensor] = []
        for convolution in self.convolutions:
            sample = nn.functional.silu(convolution(sample))
            pixels = sample.flatten(2)
            pooled += [pixels.mean(2), (pixels.var(2, unbiased=False) + _FLOOR**2).sqrt().log()]
        return self.head(torch.cat(pooled, 1)).squeeze(1)


def remaining_betas(
    level: float, steps: int, shape: Shape = "linear", solver: Solver = "bisection", first_beta: float = FIRST_BETA
) -> Tensor:
    """beta_1, ..., beta_n with (1 - beta_1) ... (1 - beta_n) = level, the last one for the step that comes first.

        linear     beta_i = b_0 + x (i - 1)          fibonacci   beta_i = x F_i with F = 1, 2, 3, 5, 8, ...

    Args:
        level: ab in (0, 1). solver: "bisection" finds the x for which the product is exact. "first_order" takes
            log(1 - beta) = -beta, which few steps make wrong, up to a beta over 1.
        first_beta: b_0. A level that b_0 alone would fall below is divided evenly. Betas are at least 1e-8.
    Returns: (n,) float64. Raises: ConfigError for a level or a number of steps that have no schedule.
    """
    check(
        "level", level, 0 < level < 1, "more than 0 and less than 1", "It is a product of 1 - beta. Look at the model."
    )
    check_count("steps", steps, "Use 10.")
    check("schedule", shape, shape in ("linear", "fibonacci"), "linear or fibonacci", "Use linear.")
    check("solver", solver, solver in ("bisection", "first_order"), "bisection or first_order", "Use bisection.")
    goal, offset = math.log(level), first_beta if shape == "linear" else 0.0
    if steps == 1 or goal > steps * math.log1p(-offset):
        return torch.full((steps,), -math.expm1(goal / steps), dtype=torch.float64)
    numbers = [0.0, 1.0] if shape == "linear" else [1.0, 2.0]
    while len(numbers) < steps:
        numbers.append(numbers[-1] + (1.0 if shape == "linear" else numbers[-2]))
    slope = torch.tensor(numbers, dtype=torch.float64)
    if solver == "first_order":
        return offset - (goal + steps * offset) / sum(numbers) * slope
    low, high = 0.0, (1 - offset) / numbers[-1]
    while low < (middle := (low + high) / 2) < high:
        betas = (offset + middle * slope).clamp(min=LEAST_BETA)
        low, high = (middle, high) if float(torch.log1p(-betas).sum()) > goal else (low, middle)
    return (offset + low * slope).clamp(min=LEAST_BETA)


def sample_adjusted(
    sample: Tensor,
    predict: Callable[[Tensor, Tensor], Tensor],
    levels_of: Callable[[Tensor], Tensor],
    scheduler: DDIMScheduler | DDPMScheduler,
    steps: Sequence[int],
    *,
    schedule: Shape = "linear",
    solver: Solver = "bisection",
    adjusted_steps: Collection[int] | None = None,
    eta: float = 0.0,
    generator: Generators = None,
) -> tuple[Tensor, list[float]]:
    """Follow a schedule from noise to a sample, and adjust it on the way.

    Begins with betas whose product is the scheduler's lowest level. After a step, its noise included, the levels of the
    samples are read, and the betas of the steps that are left get their mean as product.

    Args:
        sample: of the first step. predict: the network, of a sample and a timestep, a float32 scalar.
        levels_of: ab of each sample (N,). scheduler: its own step is taken, with the betas in place of its table.
        steps: a range, or something that shows its progress. adjusted_steps: those after which the schedule is
            adjusted, from 0; all when None, none when empty. eta: of DDIM; DDPM has noise of its own.
    Returns: the sample, and the level before each step.
    Raises: ConfigError where a level has no schedule, or the first-order solver finds a beta of 1 or more; for
        adjusted steps that are not among the steps, or another eta.
    """
    strange = sorted(set(adjusted_steps or ()) - set(range(len(steps))))
    check("adjusted_steps", adjusted_steps, not strange, f"steps from 0 to {len(steps) - 1}", "Leave them out for all.")
    check("eta", eta, 0 <= eta <= 1, "0 to 1", "It is the share of DDPM's noise. Use 0.")
    levels = [float(scheduler.alphas_cumprod[-1])]
    betas = remaining_betas(levels[0], len(steps), schedule, solver)
    noise = {"generator": generator} | ({"eta": eta} if isinstance(scheduler, DDIMScheduler) else {})
    for step in steps:
        level = torch.tensor(levels[-1], dtype=torch.float64)
        timestep = timestep_at((level / (1 - level)).log(), scheduler.alphas_cumprod)
        output = predict(sample, timestep.to(sample.device, torch.float32))
        sample = _at_last(scheduler, betas).step(output, len(betas) - 1, sample, **noise).prev_sample
        betas = betas[:-1]
        if len(betas) and (adjusted_steps is None or step in adjusted_steps):
            # of the sample that the next step starts from: with the noise of this one
            levels.append(float(levels_of(sample).double().mean()))
            betas = remaining_betas(levels[-1], len(betas), schedule, solver)
        elif len(betas):
            levels.append(float((1 - betas).prod()))
    return sample, levels


def _at_last(scheduler: Any, betas: Tensor) -> Any:
    """The scheduler at the last of these betas, as if a model had been trained on them."""
    check("schedule", float(betas.max()), float(betas.max()) < 1, "betas below 1",
          "The first-order solver overshoots with few steps. Use solver='bisection'.")  # fmt: skip
    own = {"num_train_timesteps": len(betas), "timestep_spacing": "leading", "steps_offset": 0}
    made = type(scheduler).from_config(scheduler.config, trained_betas=betas.tolist(), **own)
    made.set_timesteps(len(betas))
    made.alphas_cumprod = (1 - betas).cumprod(0)  # in float64: 1 - 1e-8 is 1 in float32
    made.final_alpha_cumprod = torch.tensor(1.0)
    return made


@dataclass
class LearnedScheduleOutput(ImagePipelineOutput):
    """Images, and the level ab before each step: the first one is the scheduler's, adjusted ones were estimated."""

    levels: list[float]


class LearnedSchedulePipeline(DDPMPipeline):
    """Unconditional sampling whose schedule is adjusted to the noise that an estimator sees: `sample_adjusted`.

    The level is a mean over the batch: an image depends on those that are drawn with it.

    Args:
        unet: predicts as the scheduler's config says. scheduler: DDIM or DDPM.
        estimator: runs in full precision; `modiff.apply` leaves it alone.
    Raises: ConfigError for another scheduler.
    """

    def __init__(self, unet: Any, scheduler: DDIMScheduler | DDPMScheduler, estimator: NoiseLevelEstimator) -> None:
        check("LearnedSchedulePipeline.scheduler", type(scheduler).__name__,
              isinstance(scheduler, (DDIMScheduler, DDPMScheduler)), "DDIMScheduler or DDPMScheduler",
              "Others have no betas, or a memory. Use DDIMScheduler.from_config(scheduler.config).")  # fmt: skip
        check("LearnedSchedulePipeline.scheduler.correction", type(scheduler).__name__,
              scheduler.config.get("correction") is None, "a scheduler without a correction",
              "Its table is for other steps. Use modiff.sampling.corrected.corrected(scheduler, None).")  # fmt: skip
        check("LearnedSchedulePipeline.estimator", type(estimator).__name__, hasattr(estimator, "levels"),
              "a NoiseLevelEstimator", "Use NoiseLevelEstimator.from_pretrained(noise_level_folder()).")  # fmt: skip
        super().__init__(unet=unet, scheduler=scheduler)
        self.register_modules(estimator=estimator)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        num_inference_steps: int = 10,
        output_type: str = "pil",
        return_dict: bool = True,
        schedule: Shape = "linear",
        solver: Solver = "bisection",
        adjusted_steps: Collection[int] | None = None,
        eta: float = 0.0,
    ) -> LearnedScheduleOutput | tuple[object, list[float]]:
        """Generate `batch_size` images in `num_inference_steps` evaluations; other options: see `sample_adjusted`."""
        check_count("num_inference_steps", num_inference_steps, "Use 10.")
        image = pixel_noise(self, batch_size, generator, output_type)
        image, levels = sample_adjusted(
            image, lambda x, t: self.unet(x, t).sample, self.estimator.levels, self.scheduler,
            self.progress_bar(range(num_inference_steps)), schedule=schedule, solver=solver,
            adjusted_steps=adjusted_steps, eta=eta, generator=generator,
        )  # fmt: skip
        image = pixel_images(self, image, output_type)
        return LearnedScheduleOutput(images=image, levels=levels) if return_dict else (image, levels)
