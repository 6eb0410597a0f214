"""Where the evaluation suite takes its images from: any source, or a pipeline in this process."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from diffusers import DiffusionPipeline
from torch import nn

from modiff.api import apply, calibrate, remove
from modiff.config import ModiffConfig
from modiff.errors import ConfigError
from modiff.evaluate.demo import TUNING_SEED, measure_step
from modiff.evaluate.suite_plans import Plan
from modiff.evaluate.trajectory_gbops import trajectory_gbops
from modiff.generate.conditions import Conditions
from modiff.generate.digest import digest, settings
from modiff.generate.samplers import set_scheduler
from modiff.generate.shards import to_uint8
from modiff.hosts.diffusers import denoisers
from modiff.hosts.inputs import call_inputs
from modiff.hosts.noise import noise_generators
from modiff.model.trajectory import state_bytes

CALIBRATION_IMAGES = 8
NOTHING = Conditions()


class Drawn(NamedTuple):
    """A batch: images uint8 (N, H, W, C), wall time, state bytes at the trajectory's end, and how many images held
    pixels that are not finite (they count as black)."""

    images: np.ndarray
    seconds: float
    state_bytes: int
    broken: int


@dataclass(frozen=True)
class Session:
    """A configuration that is ready: `draw` gives the images of sample indices; gbops of one image, all steps."""

    draw: Callable[[Sequence[int]], Drawn]
    gbops: float


class ImageSource(Protocol):
    """Something that draws images; image i is the same whatever else is drawn with it, up to float rounding.

    settings: all that shapes the images beside the plan, as plain JSON values. shape: (H, W, C) of an image.
    """

    settings: dict[str, Any]
    shape: tuple[int, int, int]

    def open(self, plan: Plan, evaluated: Callable[[], object]) -> AbstractContextManager[Session]:
        """Make a configuration ready, and undo it at the end; `evaluated` is to be called after each network call."""
        ...


class PipelineSource:
    """A pipeline in this process; image i comes from the noise of seed + i, and of its prompt or class.

    Its layers are as before whenever no session is open. Cost: two steps of one image, to count its operations and
    learn its shape.
    Args:
        conditions: what the images are drawn of, for a pipeline that takes prompts or classes.
    Raises: ConfigError for a pipeline that needs other inputs, or takes none of what is given.
    """

    def __init__(
        self, pipe: DiffusionPipeline, *, sampler: str = "ddim", seed: int = 0, conditions: Conditions = NOTHING
    ) -> None:
        _check_inputs(pipe, conditions)
        self.pipe, self.seed, self.conditions = set_scheduler(pipe, sampler), seed, conditions
        self.cost = measure_step(self.pipe, lambda: self.run(1, [0]))
        self.shape: tuple[int, int, int] = self._draw(1, [0], {}).images.shape[1:]
        networks = denoisers(self.pipe)
        self.settings: dict[str, Any] = {
            "pipeline": type(self.pipe).__name__,
            "model": digest(self.pipe),
            "schedule": settings(self.pipe.scheduler),
            "device": str(next(p.device for m in networks.values() for p in m.parameters())),
            "sampler": sampler,
            "seed": seed,
            "prompts": _short(conditions.prompts),
            "labels": _short(conditions.labels),
        }

    def run(self, steps: int, indices: Sequence[int], seed: int | None = None) -> np.ndarray:
        """The images of sample indices in [0, 1], (N, H, W, C); from another seed's noise if one is given."""
        prompts, labels = self.conditions.prompts_of(indices), self.conditions.labels_of(indices)
        inputs = call_inputs(self.pipe, len(indices), prompt=prompts, label=labels)
        noise = noise_generators(self.seed if seed is None else seed, indices)
        found = self.pipe(**inputs, num_inference_steps=steps, generator=noise, output_type="np").images
        return np.asarray(found)

    @contextmanager
    def open(self, plan: Plan, evaluated: Callable[[], object]) -> Iterator[Session]:
        """Apply the plan's config; static scales are measured first, on noise that no image comes from."""
        self._check_steps(plan.steps)
        with ExitStack() as stack:
            report = None
            if plan.config is not None:
                report = apply(self.pipe, plan.config)
                stack.callback(remove, self.pipe)
                if _static(plan.config):
                    others, seed = range(CALIBRATION_IMAGES), self.seed + TUNING_SEED
                    calibrate(self.pipe, lambda: self.run(plan.steps, others, seed))
            held: dict[str, int] = {}
            for name, model in denoisers(self.pipe).items():

                def after(model: nn.Module, *_: object, name: str = name) -> None:
                    held[name] = 0 if report is None else state_bytes(model)
                    evaluated()

                stack.callback(model.register_forward_hook(after).remove)

            def draw(indices: Sequence[int]) -> Drawn:
                return self._draw(plan.steps, indices, held)

            yield Session(draw, trajectory_gbops(self.cost, report, plan.steps))

    def _draw(self, steps: int, indices: Sequence[int], held: dict[str, int]) -> Drawn:
        start = time.perf_counter()
        found = self.run(steps, indices)
        seconds = time.perf_counter() - start
        images, broken = to_codes(found)
        return Drawn(images, seconds, sum(held.values()), broken)

    def _check_steps(self, steps: int) -> None:
        most = self.pipe.scheduler.config.num_train_timesteps
        if steps > most:
            raise ConfigError(
                f"--steps: expected at most {most}, got {steps}. The model was trained on no more. Use --steps 50."
            )


def _check_inputs(pipe: DiffusionPipeline, conditions: Conditions) -> None:
    """Raise a ConfigError if the pipeline cannot draw what it is told to."""
    given = conditions.prompts or conditions.labels
    try:
        call_inputs(pipe, len(given) or 1, prompt=conditions.prompts or None, label=conditions.labels or None)
    except ConfigError:
        if given:
            raise
        raise ConfigError(
            f"evaluate: expected an unconditional pipeline, got {type(pipe).__name__}, which needs a prompt, a class "
            "or another input. This does not invent one. Give --prompts FILE or --labels N-M where it takes them."
        ) from None


def _short(values: Sequence[str] | Sequence[int]) -> str | None:
    """All values if they are few, else how many and a digest; None for none."""
    text = ", ".join(map(str, values))
    if len(text) > 80:
        text = f"{len(values)}, sha256 {hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]}"
    return text or None


def to_codes(images: np.ndarray) -> tuple[np.ndarray, int]:
    """(N, H, W, C) in [0, 1] to bytes as `to_uint8` rounds them, and how many images are not finite: NaN becomes 0."""
    broken = int((~np.isfinite(images)).any(axis=(1, 2, 3)).sum())
    return to_uint8(np.nan_to_num(images, nan=0.0)), broken


def _static(config: ModiffConfig) -> bool:
    return not all(layer.activation.dynamic for layer in (config.layer, *(c for _, c in config.overrides)))
