"""The work of a request: full precision and the quantized network from the same noise, step by step."""

import dataclasses
import statistics
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline

from modiff import api
from modiff.config import ModiffConfig, check
from modiff.errors import ConfigError
from modiff.evaluate.analysis.layers import LayerTraces
from modiff.evaluate.analysis.watch import watch
from modiff.evaluate.pipelines import image_error
from modiff.evaluate.report.charts import layer_figure
from modiff.evaluate.report.document import Figure
from modiff.generate.job import Conditions, check_counts, parse_labels
from modiff.generate.shards import to_uint8
from modiff.generate.worker import check_inputs, draw
from modiff.hosts.diffusers.runs import followed
from modiff.model.accelerate.search import TRAJECTORIES, AccelerateResult
from modiff.model.report import Report
from modiff.model.trajectory import clone
from modiff.web.jobs import Request
from modiff.web.models import Loaded, Models
from modiff.web.previews import Previews

MOST_IMAGES, MOST_STEPS = 8, 250
HEAT = (
    "Relative error of each layer's output at each step, fed with its inputs in full precision. Dark: exact. One image."
)


@dataclass(frozen=True)
class Settings:
    """What a person chose. config None: `accelerate` chooses. sampler None: the model's own. label: "3", or "0-3,7"."""

    model: str = "embedded"
    config: str | None = "w8a4"
    integers: bool = True
    max_error: float = 0.02
    compile: bool = True
    sampler: str | None = None
    prompt: str = ""
    label: str = ""
    steps: int = 50
    num_images: int = 4
    seed: int = 0

    @property
    def name(self) -> str:
        """What the quantized images are called."""
        return self.config or "accelerate"

    @property
    def conditions(self) -> Conditions:
        """What the images are drawn of. Raises: ConfigError for classes that are no numbers."""
        labels = parse_labels(self.label) if self.label.strip() else ()
        return Conditions(prompts=(self.prompt.strip(),) if self.prompt.strip() else (), labels=labels)

    def check(self) -> None:
        """Raises: ConfigError for numbers that are out of range."""
        check_counts({"num_images": self.num_images, "steps": self.steps}, self.seed)
        for name, value, most in (("num_images", self.num_images, MOST_IMAGES), ("steps", self.steps, MOST_STEPS)):
            check(name, value, value <= most, f"at most {most}", "A page shows no more. Use modiff generate for many.")
        check("max_error", self.max_error, 0 < self.max_error < 1, "an error between 0 and 1", "0.02 is 2 percent.")


@dataclass(frozen=True)
class Run:
    """One generation: images (N, H, W, C) in [0, 1], seconds without previews, in all and by step; previews by step."""

    images: np.ndarray
    seconds: float
    steps: tuple[float, ...]
    previews: tuple[np.ndarray, ...]

    @property
    def bytes(self) -> np.ndarray:
        """The images, uint8 (N, H, W, C)."""
        return to_uint8(np.nan_to_num(self.images))

    @property
    def pace(self) -> float:
        """Seconds of a step, the median: the first ones also prepare what the others use."""
        return statistics.median(self.steps)


@dataclass(frozen=True)
class Progress:
    """What a request shows meanwhile. total 0: how long it takes is not known. full, quantized: of the same step."""

    stage: str
    step: int = 0
    total: int = 0
    full: np.ndarray | None = None
    quantized: np.ndarray | None = None


@dataclass(frozen=True)
class Compared:
    """The result. quantized None: `accelerate` left the model as it was. crowded: as `Request` has it."""

    settings: Settings
    pipeline: str
    full: Run
    config: ModiffConfig | None
    accelerated: AccelerateResult | None = None
    quantized: Run | None = None
    report: Report | None = None
    crowded: bool = False
    error: dict[str, float | None] = field(default_factory=dict)
    heat: Figure | None = None


def compare(job: Request, models: Models, settings: Settings) -> Compared:
    """Generate in full precision and quantized. The model itself stays plain: modiff is applied to a clone."""
    settings.check()
    config = None if settings.config is None else models.config(settings.config, integers=settings.integers)
    folder = models.folder(settings.model)
    with job.turn(folder):
        job.show(Progress("loading the model"))
        loaded = models.load(settings.model)
        plain = loaded.sampling(settings.sampler)
        check_inputs(plain, settings.steps, settings.conditions)
        full = _reference(job, loaded, plain, settings)
        pipe, config, accelerated = _quantized(job, loaded, plain, settings, config)
        done = Compared(settings, type(plain).__name__, full, config, accelerated)
        if config is not None:
            quantized = _run(job, pipe, settings, "quantized", full.previews)
            error = image_error(quantized.images, full.images)
            done = dataclasses.replace(done, quantized=quantized, error=error, report=api.report(pipe))
    return dataclasses.replace(done, crowded=job.crowded)


def heat_map(job: Request, models: Models, done: Compared | None) -> Compared:
    """The same with the errors of each layer at each step, of one image. Cost: a generation, each layer twice."""
    if done is None or done.config is None:
        raise ConfigError("heat map: expected quantized images, got none. It shows where their error arises. "
                          "Generate with a configuration first.")  # fmt: skip
    settings = dataclasses.replace(done.settings, num_images=1)
    with job.turn(models.folder(settings.model)):
        plain, traces = models.load(settings.model).sampling(settings.sampler), LayerTraces()
        run = partial(_run, job, plain, settings, "looking at the layers", (), shown=False)
        watch(plain, run, done.config, [traces])
    return dataclasses.replace(done, heat=layer_figure(traces.layers(), HEAT))


def _reference(job: Request, loaded: Loaded, plain: DiffusionPipeline, settings: Settings) -> Run:
    """Full precision, drawn again only where something else than the configuration changed."""
    key = dataclasses.replace(settings, config=None, integers=False, max_error=0.5, compile=False)
    if loaded.reference is None or loaded.reference[0] != key:
        loaded.reference = key, _run(job, plain, settings, "full precision")
    return loaded.reference[1]


def _quantized(
    job: Request, loaded: Loaded, plain: DiffusionPipeline, settings: Settings, config: ModiffConfig | None
) -> tuple[DiffusionPipeline, ModiffConfig | None, AccelerateResult | None]:
    """A clone with modiff on it, its config, and what `accelerate` says; kept for the next request of the same."""
    key = dataclasses.replace(settings, integers=False, seed=0) if config is None else (settings.sampler, config)
    if loaded.quantized is None or loaded.quantized[0] != key:
        loaded.quantized = None  # not two at a time in memory
        pipe = clone(plain)
        job.show(Progress("quantizing"))
        result = _accelerated(job, pipe, settings) if config is None else None
        if result is None:
            api.apply(pipe, config)
        elif result.accelerated:
            config = result.config
        loaded.quantized = key, (pipe, config, result)
    return loaded.quantized[1]


def _accelerated(job: Request, pipe: DiffusionPipeline, settings: Settings) -> AccelerateResult:
    """`modiff.accelerate` on what the request will sample; a stop ends it at the next step of a sampler."""
    ran = 0

    def example() -> np.ndarray:
        nonlocal ran
        ran += 1
        stage = "timing layers and trying settings" if ran > 2 else "measuring full precision"
        job.show(Progress(stage, min(ran, TRAJECTORIES), TRAJECTORIES))
        with followed(pipe, lambda _: job.check()):
            return _images(pipe, settings)

    return api.accelerate(pipe, settings.max_error, example, settings.compile, progress=False)


def _images(pipe: DiffusionPipeline, chosen: Settings) -> np.ndarray:
    return draw(pipe, range(chosen.num_images), steps=chosen.steps, seed=chosen.seed, conditions=chosen.conditions)


def _run(job: Request, pipe: DiffusionPipeline, settings: Settings, stage: str, others: tuple[np.ndarray, ...] = (),
         *, shown: bool = True) -> Run:  # fmt: skip
    """One generation whose steps the page follows; `others` are the previews of full precision, shown next to it."""
    previews, pictures, times = Previews(pipe, settings.num_images), list[Any](), list[float]()
    job.show(Progress(stage, 0, settings.steps, others[0] if others else None))
    start = last = time.perf_counter()

    def after(sample: Any) -> None:
        nonlocal last
        times.append(time.perf_counter() - last)
        total = len(pipe.scheduler.timesteps)
        picture = previews.of(sample) if shown else None
        pictures.append(pictures[-1] if picture is None and pictures else picture)
        both = (others[min(len(times), len(others)) - 1], pictures[-1]) if others else (pictures[-1], None)
        job.show(Progress(stage, len(times), total, *both))
        last = time.perf_counter()

    with followed(pipe, after):
        images = _images(pipe, settings)
    seconds = time.perf_counter() - start - previews.seconds
    return Run(images, seconds, tuple(times), tuple(pictures))
