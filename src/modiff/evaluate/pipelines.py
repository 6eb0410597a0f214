"""What the demo, the analysis and the suite do with a pipeline: run it under a config, count its work, show a bar."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline
from torch import nn
from tqdm import tqdm

from modiff.api import apply, remove
from modiff.config import ModiffConfig
from modiff.errors import ConfigError
from modiff.evaluate.cost import LayerCost, measure_cost
from modiff.hosts.diffusers.host import denoisers
from modiff.hosts.diffusers.runs import unconditional_run
from modiff.model.attach import attachment_of
from modiff.model.observe import observe
from modiff.model.report import Report
from modiff.model.trajectory import state_bytes


@dataclass(frozen=True)
class Sampled:
    """One trajectory of a batch: images (N, H, W, C) in [0, 1], what apply did, state bytes at its end, wall time."""

    images: np.ndarray
    report: Report | None
    state_bytes: int
    seconds: float


def run_config(pipe: DiffusionPipeline, config: ModiffConfig | None, steps: int, noise: list[Any]) -> Sampled:
    """Sample an unconditional pipeline once under `config` (None: as it is), which is removed again, also on errors."""
    report = None if config is None else apply(pipe, config)
    sizes: dict[nn.Module, int] = {}

    def measure(model: nn.Module, *_: object) -> None:
        sizes[model] = state_bytes(model)  # after each evaluation, since they are freed when the pipeline returns

    try:
        with ExitStack() as stack:
            for model in denoisers(pipe).values():
                if attachment_of(model) is not None:
                    stack.enter_context(observe(model, on_step=measure))
            start = time.perf_counter()
            images = pipe(batch_size=len(noise), num_inference_steps=steps, generator=noise, output_type="np").images
            seconds = time.perf_counter() - start
    finally:
        if report is not None:
            remove(pipe)
    return Sampled(np.asarray(images), report, sum(sizes.values()), seconds)


def measure_image(pipe: DiffusionPipeline, seed: int) -> list[LayerCost]:
    """The cost of one step of one image of an unconditional pipeline, over all denoisers. Cost: one step."""
    return measure_step(pipe, unconditional_run(pipe, 1, 1, seed))


def measure_step(pipe: DiffusionPipeline, run: Callable[[], object]) -> list[LayerCost]:
    """The cost of `run`, which draws one image in one step, over all denoisers. Cost: one run for each of them."""
    return [cost for model in denoisers(pipe).values() for cost in measure_cost(model, run)]


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


def check_unconditional(pipe: DiffusionPipeline, where: str, steps: int, num_images: int) -> None:
    """Raise a ConfigError for a pipeline that needs a prompt or another input, or no images."""
    if num_images < 1:
        raise ConfigError(
            f"{where}: expected at least 1 image, got {num_images}. There is nothing to compare. Use --num-images 4."
        )
    try:
        unconditional_run(pipe, steps, num_images, 0)
    except ConfigError:
        raise ConfigError(
            f"{where}: expected an unconditional pipeline, got {type(pipe).__name__}, which needs a prompt or another "
            "input. This does not invent one. Use `modiff sample` with --prompt or --label to see its images."
        ) from None
