"""Images of a pipeline by index, and the work of one process on a job: pure functions, the same on every machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DiffusionPipeline

from modiff.api import apply
from modiff.config import ModiffConfig
from modiff.errors import ConfigError, StateError
from modiff.generate.conditions import Conditions
from modiff.generate.digest import digest, settings
from modiff.generate.environment import environment
from modiff.generate.job import Job
from modiff.generate.samplers import set_scheduler
from modiff.generate.shards import Span, to_uint8
from modiff.hosts.diffusers.load import load_pipeline
from modiff.hosts.diffusers.runs import call_inputs, noise_generators

Description = tuple[dict[str, Any], tuple[int, int, int]]
"""What decides the images of a job (the "model" by its digest, "pipeline", "scheduler"), and their shape (H, W, C)."""


class DrawnSpan(NamedTuple):
    """The images from `first` on, uint8 (N, H, W, C), the digest of the model, and where they were made."""

    first: int
    images: np.ndarray
    digest: str
    environment: dict[str, Any]


def draw(
    pipe: DiffusionPipeline, indices: Sequence[int], *, steps: int, seed: int, conditions: Conditions
) -> np.ndarray:
    """(N, H, W, C) in [0, 1]: the image of each index, from the noise of seed + index, of its prompt or class.

    Raises: ConfigError for inputs that the pipeline cannot take; StateError for pixels that are NaN or infinite.
    """
    prompts, labels = conditions.prompts_of(indices), conditions.labels_of(indices)
    inputs = call_inputs(pipe, len(indices), prompt=prompts, label=labels)
    result = pipe(**inputs, num_inference_steps=steps, generator=noise_generators(seed, indices), output_type="np")
    images = np.asarray(result.images)
    if not np.isfinite(images).all():
        raise StateError(
            f"image {indices[0]}: expected finite pixels, got NaN or infinity. The generation diverged. Use more "
            "activation bits, or leave --config out to see whether the model itself is sound."
        )
    return images


def check_inputs(pipe: DiffusionPipeline, steps: int, conditions: Conditions) -> None:
    """Raises: ConfigError for prompts or classes that the pipeline cannot take, or more steps than in its training."""
    labels = conditions.labels or None
    call_inputs(pipe, len(conditions.labels) or 1, prompt=conditions.prompts_of([0]), label=labels)
    most = pipe.scheduler.config.num_train_timesteps
    if steps > most:
        raise ConfigError(
            f"--steps: expected at most {most}, got {steps}. The model was trained on no more. Use --steps 50."
        )


def describe(job: Job) -> Description:
    """Open the model, see that it can do the job, and draw one image in two steps to learn its shape.

    Raises: FormatError, ConfigError or CalibrationError as the model or the job gives reason.
    """
    pipe, model = _pipeline(job)
    check_inputs(pipe, job.steps, job.conditions)
    # two: the first evaluation is in full precision, so that one would not see scales that are missing
    image = draw(pipe, [0], steps=min(2, job.steps), seed=job.seed, conditions=job.conditions)[0]
    height, width, channels = image.shape
    scheduler = {"kind": type(pipe.scheduler).__name__} | settings(pipe.scheduler)
    facts = {"model": model, "pipeline": type(pipe).__name__, "scheduler": scheduler}
    return facts, (height, width, channels)


def draw_span(job: Job, batch_size: int, span: Span, tick: Callable[[int], object] = lambda images: None) -> DrawnSpan:
    """The images of a span, which begins with a whole batch; `tick` is called with their number after each batch.

    All batches are of one size, the last one too: its superfluous images are dropped. Kernels choose their order of
    summation by the batch, so an image would otherwise depend on how many are drawn.

    Raises: StateError for pixels that are not finite.
    """
    pipe, model = _pipeline(job)
    batches: list[np.ndarray] = []
    for start in range(span.first, span.first + span.count, batch_size):
        indices = range(start, start + batch_size)
        images = draw(pipe, indices, steps=job.steps, seed=job.seed, conditions=job.conditions)
        batches.append(to_uint8(images[: span.first + span.count - start]))
        tick(len(batches[-1]))
    return DrawnSpan(span.first, np.concatenate(batches), model, dict(environment()))


def close() -> None:
    """Let go of the model."""
    _open.cache_clear()


def _pipeline(job: Job) -> tuple[DiffusionPipeline, str]:
    """The pipeline of a job and the digest of its model; this process has the job's threads then, and no TF32."""
    torch.backends.cudnn.allow_tf32 = False  # images of full precision are what others are compared with
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    config = None if job.config is None else ModiffConfig.from_dict(job.config)
    return _open(job.model, job.device, job.scheduler, config)


@lru_cache(maxsize=1)
def _open(model: str, device: str, scheduler: str | None, config: ModiffConfig | None) -> tuple[DiffusionPipeline, str]:
    """A pipeline and the digest of its model; kept for the next span."""
    pipe = load_pipeline(model, device=device)
    pipe = pipe if scheduler is None else set_scheduler(pipe, scheduler)
    weights = digest(pipe)
    if config is not None:
        apply(pipe, config)
    return pipe, weights
