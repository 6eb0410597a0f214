"""What the demo, the analysis and the suite do with a pipeline: run it under a config, count its work, show it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline
from torch import nn
from tqdm import tqdm

from modiff.api import apply, calibrate, remove
from modiff.config import ModiffConfig
from modiff.errors import ConfigError
from modiff.evaluate.cost import LayerCost, measure_cost
from modiff.evaluate.metrics.paired import psnr, relative_l2
from modiff.generate.job import Conditions
from modiff.hosts.diffusers.host import denoisers
from modiff.hosts.diffusers.runs import call_inputs
from modiff.model.observe import observe
from modiff.model.report import Report
from modiff.model.trajectory import state_bytes

NOTHING = Conditions()


@dataclass(frozen=True)
class Sampled:
    """One trajectory of a batch: images (N, H, W, C) in [0, 1], what apply did, state bytes at its end, wall time."""

    images: np.ndarray
    report: Report | None
    state_bytes: int
    seconds: float


def run_config(pipe: DiffusionPipeline, config: ModiffConfig | None, steps: int, noise: list[Any]) -> Sampled:
    """Sample an unconditional pipeline once under `config` (None: as it is), which is removed again, also on errors."""
    with configured(pipe, config) as (report, sizes):
        start = time.perf_counter()
        images = pipe(batch_size=len(noise), num_inference_steps=steps, generator=noise, output_type="np").images
        seconds = time.perf_counter() - start
    return Sampled(np.asarray(images), report, sum(sizes.values()), seconds)


@contextmanager
def configured(
    pipe: DiffusionPipeline,
    config: ModiffConfig | None,
    *,
    calibration: Callable[[], object] | None = None,
    evaluated: Callable[[], object] | None = None,
) -> Iterator[tuple[Report | None, dict[nn.Module, int]]]:
    """A pipeline under a config in the body, with what `apply` did and each network's state bytes, measured as it runs.

    Args:
        calibration: samples a trajectory, for configs with static scales. evaluated: called after each network call.
    """
    sizes: dict[nn.Module, int] = {}

    def after_step(model: nn.Module, *_: object) -> None:
        if config is not None:
            sizes[model] = state_bytes(model)  # now: they are freed when the pipeline returns
        if evaluated is not None:
            evaluated()

    with ExitStack() as stack:
        report = None
        if config is not None:
            report = apply(pipe, config)
            stack.callback(remove, pipe)
            if calibration is not None and has_static_scales(config):
                calibrate(pipe, calibration)
        for model in denoisers(pipe).values():
            stack.enter_context(observe(model, on_step=after_step))
        yield report, sizes


def has_static_scales(config: ModiffConfig) -> bool:
    """Whether some layer's scales are measured once, on a modulated model, and not at each step."""
    return not all(layer.activation.dynamic for layer in (config.layer, *(layer for _, layer in config.overrides)))


def measure_step(pipe: DiffusionPipeline, run: Callable[[], object]) -> list[LayerCost]:
    """The cost of `run`, which draws one image in one step, over all denoisers. Cost: one run for each of them."""
    return [cost for model in denoisers(pipe).values() for cost in measure_cost(model, run)]


def image_error(value: np.ndarray, reference: np.ndarray) -> dict[str, float | None]:
    """Relative L2 and PSNR of images in [0, 1]. None if they are not finite; psnr_db also if they are equal."""
    if not np.isfinite(value).all():
        return {"relative_l2": None, "psnr_db": None}
    decibels = psnr(value, reference)
    return {"relative_l2": relative_l2(value, reference), "psnr_db": decibels if math.isfinite(decibels) else None}


@contextmanager
def evaluations_bar(pipe: DiffusionPipeline, total: int, shown: bool) -> Iterator[tqdm[Any]]:
    """A bar on stderr that counts network evaluations, instead of the pipeline's own."""
    own = getattr(pipe, "_progress_bar_config", {})
    with (
        tqdm(total=total, unit="step", disable=not shown, dynamic_ncols=True, mininterval=0.5) as bar,
        ExitStack() as stack,
    ):
        stack.callback(lambda: pipe.set_progress_bar_config(**own))
        pipe.set_progress_bar_config(disable=True)
        for model in denoisers(pipe).values():
            stack.enter_context(observe(model, on_step=lambda *_: bar.update()))
        yield bar


def check_pipeline(pipe: DiffusionPipeline, where: str, num_images: int = 1, conditions: Conditions = NOTHING) -> None:
    """Raise a ConfigError if the pipeline needs other inputs than these, or is to draw no images."""
    if num_images < 1:
        raise ConfigError(
            f"{where}: expected at least 1 image, got {num_images}. There is nothing to compare. Use --num-images 4."
        )
    values = conditions.prompts or conditions.labels
    try:
        call_inputs(pipe, len(values) or 1, prompt=conditions.prompts or None, label=conditions.labels or None)
    except ConfigError:
        if values:
            raise
        raise ConfigError(
            f"{where}: expected an unconditional pipeline, got {type(pipe).__name__}, which needs a prompt, a class or "
            "another input. This does not invent one. `modiff evaluate` takes --prompts FILE and --labels N-M."
        ) from None


def aligned(cells: Sequence[Sequence[str]]) -> str:
    """A head, a rule and rows of equal length; the first column starts at the left, the others end at the right."""
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    head, *lines = (
        "  ".join([name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))])
        for name, *rest in cells
    )
    return "\n".join([head, "-" * len(head), *lines])


def number(value: float | None, form: str) -> str:
    """A formatted number; a dash for None."""
    return "-" if value is None else format(value, form)
