"""The work of one process: open the model once, draw spans of images; pure functions of the job."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from modiff.api import apply
from modiff.config import ModiffConfig
from modiff.generate.digest import digest, settings
from modiff.generate.draw import check_finite, check_steps, draw
from modiff.generate.environment import environment
from modiff.generate.job import Job
from modiff.generate.samplers import set_scheduler
from modiff.generate.shards import Span, to_uint8
from modiff.hosts.diffusers.load import load_pipeline
from modiff.hosts.diffusers.runs import call_inputs


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a job turns out to be once its model is open.

    digest: of the networks. pipeline: its class. scheduler: kind and settings. shape: (H, W, C) of an image.
    """

    digest: str
    pipeline: str
    scheduler: dict[str, Any]
    shape: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Images of a span, uint8 (N, H, W, C), and by what they were made."""

    first: int
    images: np.ndarray
    digest: str
    environment: dict[str, Any]


def describe(job: Job) -> Description:
    """Open the model, see that it can do the job, and draw one image in two steps to learn its shape.

    Raises: FormatError, ConfigError or CalibrationError as the model or the job gives reason.
    """
    pipe, model = _pipeline(job)
    known = job.conditions
    call_inputs(pipe, len(known.labels) or 1, prompt=known.prompts_of([0]), label=known.labels or None)  # all of them
    check_steps(pipe, job.steps)
    # two: the first evaluation is in full precision, so that one would not see scales that are missing
    image = draw(pipe, [0], steps=min(2, job.steps), seed=job.seed, conditions=known)[0]
    height, width, channels = image.shape
    scheduler = {"kind": type(pipe.scheduler).__name__} | settings(pipe.scheduler)
    shape = (height, width, channels)
    return Description(digest=model, pipeline=type(pipe).__name__, scheduler=scheduler, shape=shape)


def draw_span(job: Job, batch_size: int, span: Span, tick: Callable[[int], object] = lambda images: None) -> Drawn:
    """The images of a span, which begins with a whole batch.

    All batches are of one size, the last one too: what it has too many is dropped. Kernels choose their order of
    summation by the batch, so an image would else depend on how many were asked for.

    Args:
        tick: called with the number of images after each batch.
    Raises: StateError for pixels that are not finite.
    """
    pipe, model = _pipeline(job)
    parts: list[np.ndarray] = []
    for start in range(span.first, span.first + span.count, batch_size):
        indices = range(start, start + batch_size)
        images = draw(pipe, indices, steps=job.steps, seed=job.seed, conditions=job.conditions)
        images = images[: span.first + span.count - start]
        check_finite(images, start)
        parts.append(to_uint8(images))
        tick(len(images))
    return Drawn(first=span.first, images=np.concatenate(parts), digest=model, environment=dict(environment()))


def close() -> None:
    """Let go of the model."""
    _open.cache_clear()


def _pipeline(job: Job) -> tuple[DiffusionPipeline, str]:
    """The pipeline of a job and the digest of its model; this process has the job's threads then, and no TF32."""
    torch.backends.cudnn.allow_tf32 = False  # images of full precision are what others are compared with
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    return _open(job.loading())


@lru_cache(maxsize=1)
def _open(loading: tuple[str, str, str | None, str | None]) -> tuple[DiffusionPipeline, str]:
    """A pipeline and the digest of its model; kept for the next span."""
    model, device, scheduler, config = loading
    pipe = load_pipeline(model, device=device)
    pipe = pipe if scheduler is None else set_scheduler(pipe, scheduler)
    found = digest(pipe)
    if config is not None:
        apply(pipe, ModiffConfig.from_json(config))
    return pipe, found
