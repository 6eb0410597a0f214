"""What the demo, the analysis and the suite do with a pipeline: run it under a config, count its work, show it."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from diffusers import DiffusionPipeline
from torch import nn

from modiff.api import apply, calibrate, remove
from modiff.config import ModiffConfig
from modiff.evaluate.cost import LayerCost, measure_cost, trajectory_gbops
from modiff.evaluate.metrics.paired import psnr, relative_l2
from modiff.evaluate.timing import TimeBar
from modiff.generate.job import Conditions
from modiff.generate.samplers import set_scheduler
from modiff.generate.worker import check_inputs, digest, settings
from modiff.hosts.diffusers.host import denoisers
from modiff.hosts.diffusers.runs import call_inputs, noise_generators, pixels_of
from modiff.model.observe import observe
from modiff.model.trajectory import state_bytes

NOTHING = Conditions()
CALIBRATION_IMAGES = 8
TUNING_SEED = 1_000_003
"""Added to the seed: tuning and calibration never see the noise that their results are judged on."""


class DrawnImages(NamedTuple):
    """A batch (N, H, W, C), in [0, 1] or as bytes; wall time, state bytes at the trajectory's end, how many images held
    pixels that are not finite (black, as bytes), and the bit-operations of one image in 10^9."""

    images: np.ndarray
    seconds: float = 0.0
    state_bytes: int = 0
    broken: int = 0
    gbops: float = 0.0


class PipelineSource:
    """A pipeline in this process; image i comes from the noise of seed + i, and of its prompt or class.

    Its layers are as before whenever no config is open. sampler: see `set_scheduler`; the pipeline's own when None.
    Raises: ConfigError for a pipeline that needs other inputs, or does not take these conditions.
    """

    def __init__(
        self, pipe: DiffusionPipeline, *, sampler: str | None = None, seed: int = 0, conditions: Conditions = NOTHING
    ) -> None:
        check_inputs(pipe, 1, conditions)
        self.pipe = pipe if sampler is None else set_scheduler(pipe, sampler)
        self.seed, self.conditions = seed, conditions

    @cached_property
    def costs(self) -> list[LayerCost]:
        """Of one step of one image. Cost: one step for each network."""
        return measure_step(self.pipe, lambda: self.draw(1, [0]))

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """(H, W, C) of an image. Cost: one step."""
        return self.draw(1, [0]).shape[1:]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All that shapes the images except config and steps, as plain JSON values. Cost: reads all weights once."""
        return {
            "pipeline": type(self.pipe).__name__,
            "model": digest(self.pipe),
            "sampler": type(self.pipe.scheduler).__name__,
            "schedule": settings(self.pipe.scheduler),
            "device": str(next(p.device for m in denoisers(self.pipe).values() for p in m.parameters())),
            "seed": self.seed,
            "prompts": _short(self.conditions.prompts),
            "labels": _short(self.conditions.labels),
        }

    def draw(self, steps: int, indices: Sequence[int], seed: int | None = None) -> np.ndarray:
        """The images of sample indices in [0, 1], (N, H, W, C); from the noise of `seed` instead of its own."""
        inputs = call_inputs(self.pipe, len(indices), **self.conditions.of(indices))
        noise = noise_generators(self.seed if seed is None else seed, indices)
        return pixels_of(self.pipe, inputs, steps, noise)

    @contextmanager
    def open(self, config: ModiffConfig | None, steps: int) -> Iterator[Callable[[Sequence[int]], DrawnImages]]:
        """Apply a config (None: none) in the body, and give a function that draws the images of sample indices.

        Static scales are measured first, on noise that no image comes from.
        """
        check_inputs(self.pipe, steps, self.conditions)
        sizes: dict[nn.Module, int] = {}

        def after_step(model: nn.Module, *_: object) -> None:
            sizes[model] = state_bytes(model)  # now: they are freed when the pipeline returns

        with ExitStack() as stack:
            report = None
            if config is not None:
                report = apply(self.pipe, config)
                stack.callback(remove, self.pipe)
                if has_static_scales(config):
                    others = range(CALIBRATION_IMAGES)
                    calibrate(self.pipe, lambda: self.draw(steps, others, self.seed + TUNING_SEED))
                for model in denoisers(self.pipe).values():
                    stack.enter_context(observe(model, on_step=after_step))
            gbops = trajectory_gbops(self.costs, report, steps)

            def draw(indices: Sequence[int]) -> DrawnImages:
                start = time.perf_counter()
                images = self.draw(steps, indices)
                return DrawnImages(images, time.perf_counter() - start, sum(sizes.values()), 0, gbops)

            yield draw

    @contextmanager
    def bar(self, parts: Sequence[tuple[str, float, int]], shown: bool) -> Iterator[TimeBar]:
        """A bar on stderr for what is to be drawn, instead of the pipeline's own."""
        _ = self.costs  # evaluates: not to be counted
        own = getattr(self.pipe, "_progress_bar_config", {})
        with TimeBar(parts, shown=shown) as bar, ExitStack() as stack:
            stack.callback(lambda: self.pipe.set_progress_bar_config(**own))
            self.pipe.set_progress_bar_config(disable=True)
            for model in denoisers(self.pipe).values():
                stack.enter_context(observe(model, on_step=lambda *_: bar.step()))
            yield bar


def _short(values: Sequence[str] | Sequence[int]) -> str | None:
    """All values if they are few, otherwise their number and a digest; None if there are none."""
    text = ", ".join(map(str, values))
    if len(text) > 80:
        text = f"{len(values)}, sha256 {hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]}"
    return text or None


def measure_step(pipe: DiffusionPipeline, run: Callable[[], object]) -> list[LayerCost]:
    """The cost of `run`, which draws one image in one step, over all denoisers. Cost: one run for each of them."""
    return [cost for model in denoisers(pipe).values() for cost in measure_cost(model, run)]


def network_bytes(pipe: DiffusionPipeline) -> int:
    """The size of a pipeline's denoisers: weights, or their packed codes and scales."""
    tensors = [tensor for model in denoisers(pipe).values() for tensor in model.state_dict().values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def has_static_scales(config: ModiffConfig) -> bool:
    """Whether some layer's scales are measured once, on a modulated model, and not at each step."""
    return not all(layer.activation.dynamic for layer in (config.layer, *(layer for _, layer in config.overrides)))


def image_error(value: np.ndarray, reference: np.ndarray) -> dict[str, float | None]:
    """Relative L2 and PSNR of images in [0, 1]. None if they are not finite; psnr_db also if they are equal."""
    if not np.isfinite(value).all():
        return {"relative_l2": None, "psnr_db": None}
    decibels = psnr(value, reference)
    return {"relative_l2": relative_l2(value, reference), "psnr_db": decibels if math.isfinite(decibels) else None}


def aligned(cells: Sequence[Sequence[str]]) -> str:
    """A head, a rule and rows of equal length; the first column starts at the left, the others end at the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    head, *lines = (
        "  ".join([name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))])
        for name, *rest in cells
    )
    return "\n".join([head, "-" * len(head), *lines])
