"""Images of a pipeline by index, and the work of one process on a job: pure functions, the same on every machine."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import nn

from modiff.api import apply
from modiff.config import ModiffConfig, check
from modiff.errors import StateError
from modiff.generate.environment import environment
from modiff.generate.job import Conditions, Job
from modiff.generate.samplers import set_scheduler
from modiff.generate.shards import Span, to_uint8
from modiff.hosts.diffusers.load import load_pipeline
from modiff.hosts.diffusers.runs import call_inputs, noise_generators, pixels_of

_OF_THE_LIBRARY = ("transformers_version", "torch_dtype", "dtype")
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
    inputs = call_inputs(pipe, len(indices), **conditions.of(indices))
    images = pixels_of(pipe, inputs, steps, noise_generators(seed, indices))
    if not np.isfinite(images).all():
        raise StateError(
            f"image {indices[0]}: expected finite pixels, got NaN or infinity. The generation diverged. Use more "
            "activation bits, or leave `config` out to see whether the model itself is sound."
        )
    return images


def check_inputs(pipe: DiffusionPipeline, steps: int, conditions: Conditions) -> None:
    """Raises: ConfigError for prompts or classes that the pipeline cannot take, or more steps than in its training."""
    count = len(conditions.labels) or 1
    call_inputs(pipe, count, **conditions.of(range(count)))
    most = pipe.scheduler.config.num_train_timesteps
    check("steps", steps, steps <= most, f"at most {most}", "The model was trained on no more. Use steps=50.")


def describe(job: Job) -> Description:
    """Open the model, see that it can do the job (FormatError, ConfigError, CalibrationError), and learn its shape."""
    pipe, model = _pipeline(job)
    check_inputs(pipe, job.steps, job.conditions)
    # two: the first evaluation is in full precision, so that one would not see scales that are missing; a corrected
    # sampler knows its own steps alone
    steps = job.steps if "correction" in pipe.scheduler.config else min(2, job.steps)
    image = draw(pipe, [0], steps=steps, seed=job.seed, conditions=job.conditions)[0]
    scheduler = {"kind": type(pipe.scheduler).__name__} | settings(pipe.scheduler)
    facts = {"model": model, "pipeline": type(pipe).__name__, "scheduler": scheduler}
    return facts, image.shape


def draw_span(job: Job, batch_size: int, span: Span, tick: Callable[[int], object] = lambda images: None) -> DrawnSpan:
    """The images of a span, which begins with a whole batch; `tick` is called with their number after each batch.

    All batches are of one size, also the last one, whose superfluous images are dropped: kernels choose their order of
    summation by the batch. Raises: StateError for pixels that are not finite.
    """
    pipe, model = _pipeline(job)
    batches: list[np.ndarray] = []
    for start in range(span.first, span.first + span.count, batch_size):
        indices = range(start, start + batch_size)
        images = draw(pipe, indices, steps=job.steps, seed=job.seed, conditions=job.conditions)
        batches.append(to_uint8(images[: span.first + span.count - start]))
        tick(len(batches[-1]))
    return DrawnSpan(span.first, np.concatenate(batches), model, dict(environment()))


def _pipeline(job: Job) -> tuple[DiffusionPipeline, str]:
    """The pipeline of a job and the digest of its model; this process has the job's threads then, and no TF32."""
    torch.backends.cudnn.allow_tf32 = False  # images of full precision are what others are compared with
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    return opened(job.model, job.device, job.scheduler, job.config)


@lru_cache(maxsize=1)
def opened(model: str, device: str, scheduler: str | None, config: ModiffConfig | None) -> tuple[Any, str]:
    """A pipeline and the digest of its model; kept for the next span."""
    pipe = load_pipeline(model, device=device)
    pipe = pipe if scheduler is None else set_scheduler(pipe, scheduler)
    weights = digest(pipe)
    if config is not None:
        apply(pipe, config)
    return pipe, weights


def digest(pipe: DiffusionPipeline) -> str:
    """sha256 over kind, settings and weights of every component but the scheduler; paths and versions do not count.

    Cost: reads all weights once.
    """
    total = hashlib.sha256()
    for name, component in sorted(pipe.components.items()):
        if name == "scheduler":
            continue
        total.update(json.dumps([name, type(component).__name__, settings(component)], sort_keys=True).encode())
        if isinstance(component, nn.Module):
            for key, tensor in sorted(component.state_dict().items()):
                total.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
                total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def settings(component: object) -> dict[str, Any]:
    """A component's config as plain JSON values, without what the library keeps for itself."""
    values = _plain(getattr(component, "config", {}))
    kept = {key: value for key, value in values.items() if not key.startswith("_") and key not in _OF_THE_LIBRARY}
    return json.loads(json.dumps(kept, default=_plain), parse_constant=str)  # DPM-Solver's lambda_min_clipped is -inf


def _plain(value: Any) -> Any:
    """A config as a dictionary, also one within another; other objects by their kind, as their text may hold ids."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    return dict(value) if isinstance(value, Mapping) else f"{type(value).__module__}.{type(value).__qualname__}"
