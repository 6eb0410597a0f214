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
from modiff.errors import ModiffError
from modiff.evaluate.analysis.layers import LayerTraces
from modiff.evaluate.analysis.watch import watch
from modiff.evaluate.pipelines import image_error
from modiff.evaluate.report.charts import layer_figure
from modiff.evaluate.report.document import Figure
from modiff.generate.job import Conditions, check_counts, parse_labels
from modiff.generate.shards import to_uint8
from modiff.generate.worker import check_inputs, draw
from modiff.model.accelerate.search import TRAJECTORIES, AccelerateResult
from modiff.model.report import Report
from modiff.model.trajectory import clone
from modiff.web.jobs import Job
from modiff.web.models import Loaded, Models
from modiff.web.previews import Previews, followed

MOST_IMAGES, MOST_STEPS = 8, 250
HEAT_IMAGES = 1
HEAT = (
    "Relative error of the output of each layer at each step, each fed with the inputs that it has in full precision. "
    "Dark or empty: exact. One image."
)


@dataclass(frozen=True)
class Settings:
    """What a person chose. config None: `accelerate` chooses, within `max_error`. sampler None: the model's own.

    label: as `parse_labels` reads it; image i is drawn of number i modulo how many they are.
    """

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
    """One generation. images: (N, H, W, C) in [0, 1]. seconds: without previews. steps: seconds of each step.

    previews: uint8 (n, H, W, C) after each step, as far as they were made.
    """

    images: np.ndarray
    seconds: float
    steps: tuple[float, ...]
    previews: tuple[np.ndarray, ...]

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
class Comparison:
    """The result. quantized None: `accelerate` left the model as it was, and `accelerated` says why.

    config: what the layers run with. crowded: other models were at work at the same time.
    """

    settings: Settings
    pipeline: str
    full: Run
    quantized: Run | None
    config: ModiffConfig | None
    report: Report | None
    accelerated: AccelerateResult | None = None
    crowded: bool = False
    error: dict[str, float | None] = field(default_factory=dict)
    heat: Figure | None = None


@dataclass
class _Quantized:
    """What is made of a model for a configuration, and kept for the next request of the same."""

    pipe: DiffusionPipeline
    config: ModiffConfig | None
    accelerated: AccelerateResult | None


def compare(job: Job, models: Models, settings: Settings) -> Comparison:
    """Generate in full precision and quantized. The model itself stays plain: modiff is applied to a clone.

    Raises: ModiffError for what cannot be done; Cancelled.
    """
    settings.check()
    config = None if settings.config is None else models.config(settings.config, integers=settings.integers)
    folder = models.folder(settings.model)
    with job.turn(folder):
        job.show(Progress("loading the model"))
        loaded = models.load(settings.model)
        plain = loaded.sampling(settings.sampler)
        check_inputs(plain, settings.steps, settings.conditions)
        full = _reference(job, loaded, plain, settings)
        made = _quantized(job, loaded, plain, settings, config)
        quantized, error, report = None, {}, None
        if made.config is not None:
            quantized = _run(job, made.pipe, settings, "quantized", full.previews)
            error, report = image_error(quantized.images, full.images), api.report(made.pipe)
    return Comparison(settings, type(plain).__name__, full, quantized, made.config, report, made.accelerated,
                      job.crowded, error)  # fmt: skip


def heat_map(job: Job, models: Models, done: Comparison) -> Comparison:
    """The same with the errors of each layer at each step, of one image. Cost: a generation, each layer twice."""
    config, settings = done.config, dataclasses.replace(done.settings, num_images=HEAT_IMAGES)
    check("heat map", None, config is not None, "a quantized model", "Nothing was quantized. Choose a configuration.")
    with job.turn(models.folder(settings.model)):
        plain, traces = models.load(settings.model).sampling(settings.sampler), LayerTraces()
        run = partial(_run, job, plain, settings, "looking at the layers", (), shown=False)
        watch(plain, run, config or ModiffConfig(), [traces])
    return dataclasses.replace(done, heat=layer_figure(traces.layers(), HEAT))


def _reference(job: Job, loaded: Loaded, plain: DiffusionPipeline, settings: Settings) -> Run:
    """Full precision, drawn again only where something else than the configuration changed."""
    key = dataclasses.replace(settings, config=None, integers=False, max_error=0.5, compile=False)
    if loaded.reference is None or loaded.reference[0] != key:
        loaded.reference = None
        loaded.reference = key, _run(job, plain, settings, "full precision")
    return loaded.reference[1]


def _quantized(
    job: Job, loaded: Loaded, plain: DiffusionPipeline, settings: Settings, config: ModiffConfig | None
) -> _Quantized:
    """A clone with modiff on it, from the last request where that asked for the same."""
    key: Any = (settings.sampler, config)
    if config is None:  # measured on trajectories as they will be
        key = dataclasses.replace(settings, integers=False)
    if loaded.quantized is None or loaded.quantized[0] != key:
        loaded.quantized = None  # not two at a time in memory
        pipe = clone(plain)
        if config is not None:
            job.show(Progress("quantizing"))
            api.apply(pipe, config)
            loaded.quantized = key, _Quantized(pipe, config, None)
        else:
            result = _accelerated(job, pipe, settings)
            loaded.quantized = key, _Quantized(pipe, result.config if result.accelerated else None, result)
    return loaded.quantized[1]


def _accelerated(job: Job, pipe: DiffusionPipeline, settings: Settings) -> AccelerateResult:
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


def _images(pipe: DiffusionPipeline, settings: Settings) -> np.ndarray:
    indices = range(settings.num_images)
    return draw(pipe, indices, steps=settings.steps, seed=settings.seed, conditions=settings.conditions)


def _run(job: Job, pipe: DiffusionPipeline, settings: Settings, stage: str, others: tuple[np.ndarray, ...] = (),
         *, shown: bool = True) -> Run:  # fmt: skip
    """One generation whose steps the page follows; `others` are the previews of full precision, shown next to it."""
    previews, pictures, times = Previews(pipe, settings.num_images), list[np.ndarray](), list[float]()
    job.show(Progress(stage, 0, settings.steps, others[0] if others else None))
    start = last = time.perf_counter()

    def after(sample: Any) -> None:
        nonlocal last
        times.append(time.perf_counter() - last)
        total = len(pipe.scheduler.timesteps)
        picture = previews.of(sample) if shown else None
        pictures.append(picture if picture is not None else pictures[-1] if pictures else np.zeros((0, 1, 1, 3), "u1"))
        other = others[min(len(times), len(others)) - 1] if others else None
        full, quantized = (other, pictures[-1]) if others else (pictures[-1], None)
        job.show(Progress(stage, len(times), total, full if shown else None, quantized))
        last = time.perf_counter()

    with followed(pipe, after):
        images = _images(pipe, settings)
    seconds = time.perf_counter() - start - previews.seconds
    return Run(images, seconds, tuple(times), tuple(pictures))


def in_words(error: BaseException) -> str:
    """One line for the page."""
    text = str(error).strip().partition("\n")[0]
    if isinstance(error, ModiffError):
        return text
    return f"{type(error).__name__}: {text[:200] or 'no reason given'}. The server's own output says more."


def as_bytes(run: Run) -> np.ndarray:
    """The images of a run, uint8 (N, H, W, C)."""
    return to_uint8(np.nan_to_num(run.images))
