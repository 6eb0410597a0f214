"""Where the experiments are done: it samples, compares with full precision, and remembers every run."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
from diffusers import DiffusionPipeline
from tqdm import tqdm

from experiments.runs import PARALLEL, Outcome, Run, compare, errors_of
from experiments.skipping import Tally, full_precision_first_step, skip_below
from modiff.api import apply, remove
from modiff.config import JsonConfig, ModiffConfig, check
from modiff.errors import ConfigError
from modiff.evaluate.analysis.watch import Watcher, watch
from modiff.evaluate.cost import LayerCost, trajectory_gbops
from modiff.evaluate.pipelines import measure_step
from modiff.files import check_writable, read_json, write_json
from modiff.generate.samplers import set_scheduler
from modiff.hosts.diffusers.host import denoisers
from modiff.hosts.diffusers.runs import calibration_run, noise_generators
from modiff.model.observe import observe
from modiff.model.report import Report
from modiff.sampling.pipelines import ParallelPipeline

Row = dict[str, Any]
Plan = Sequence[tuple[Row, Run]]
"""What a row of a table says of itself, and the run behind it."""
Depth = Literal["quick", "full"]
IMAGES: dict[Depth, int] = {"quick": 8, "full": 32}


@dataclass(frozen=True, kw_only=True)
class StudySettings(JsonConfig):
    """What every experiment shares.

    depth: "quick" runs coarse grids, "full" fine ones. steps: of DDIM, where an experiment does not say otherwise.
    num_images: image i comes from the noise of seed + i, in batches of `batch_size`.
    """

    depth: Depth = "quick"
    steps: int = 50
    num_images: int = IMAGES["quick"]
    seed: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check("StudySettings.steps", self.steps, self.steps >= 10, "10 or more steps",
              "Rows with a tenth of them are run as well. Use 50.")  # fmt: skip
        for name in ("num_images", "batch_size"):
            value = getattr(self, name)
            check(f"StudySettings.{name}", value, value >= 1, "1 or more images", "Use 8.")

    @property
    def full(self) -> bool:
        """Whether the grids are fine."""
        return self.depth == "full"


def kept(path: Path) -> dict[str, Any] | None:
    """What an earlier study wrote there; None if it did not come to it. Raises: FormatError for a damaged file."""
    if not path.exists():
        return None
    return read_json(path, "figures of an earlier study", "Delete it: the next study measures it again.")


class _Sampled(NamedTuple):
    images: np.ndarray
    evaluations: int
    gbops: float | None


class Lab:
    """A pipeline, the study's settings, and a folder of runs; between runs the pipeline is unchanged.

    Args:
        pipe: unconditional, without modiff.
        folder: of what runs gave, one JSON file for a run and what it is compared with.
        progress: a bar on stderr for each experiment, in network evaluations.
    Cost: one step of one image, to count its operations.
    """

    def __init__(self, pipe: DiffusionPipeline, settings: StudySettings, folder: Path, *, progress: bool) -> None:
        self._pipe, self.settings, self.folder, self._progress = pipe, settings, folder, progress
        self.doing = ""
        self._references: dict[str, _Sampled] = {}
        with self.sampling(Run(steps=1)) as ddim:
            self.cost: list[LayerCost] = measure_step(ddim, partial(calibration_run(ddim, steps=1, batch=1), 0))

    @property
    def most_steps(self) -> int:
        """As many as the model was trained on."""
        return int(self._pipe.scheduler.config.num_train_timesteps)

    def rows(self, plan: Plan, *, reference: Run | None = None, limit: Run | None = None) -> list[Row]:
        """A row for each run: what it says of itself, its errors, evaluations and bit-operations.

        Args:
            reference: what the images are compared with; the same sampler and steps in full precision when None.
            limit: another run to compare with, for the field "to_limit": the median error over the images.
        Cost: a trajectory for each batch of a run that no earlier call or study made.
        """
        todo: dict[str, tuple[Run, list[Run]]] = {}
        for _, run in plan:
            against = [reference or run.reference, *([limit] if limit else [])]
            if missing := [other for other in against if not self._path(run, other).exists()]:
                todo[run.key] = run, missing
        sampled = {r.key: r for run, missing in todo.values() for r in (run, *missing)}
        with self.bar(sum(run.steps for key, run in sampled.items() if key not in self._references)) as advance:
            for run, missing in todo.values():
                self._measure(run, missing, advance)
        return [self._row(labels, run, reference or run.reference, limit) for labels, run in plan]

    def watch(self, config: ModiffConfig, watchers: Sequence[Watcher], steps: int) -> Report:
        """Show the watchers one full-precision DDIM trajectory of one batch; see `modiff.evaluate.analysis.watch`."""
        with self.sampling(Run(steps=steps)) as pipe, self.bar(steps) as advance, _counted(pipe, lambda _: advance()):
            count = min(self.settings.num_images, self.settings.batch_size)
            return watch(pipe, lambda: self.sample(pipe, range(count), steps), config, watchers)

    @contextmanager
    def sampling(self, run: Run) -> Iterator[DiffusionPipeline]:
        """The pipeline with the run's sampler and spacing, within the body."""
        own = self._pipe.scheduler
        if run.steps > own.config.num_train_timesteps:
            raise ConfigError(
                f"experiments: expected at most {own.config.num_train_timesteps} steps, got {run.steps}. The model was "
                "trained on no more. Use --steps 50."
            )
        try:
            pipe = set_scheduler(self._pipe, run.sampler.removeprefix(PARALLEL))
            if run.sampler.startswith(PARALLEL):
                pipe = ParallelPipeline(unet=pipe.unet, scheduler=pipe.scheduler)
            pipe.set_progress_bar_config(disable=True)
            if run.spacing is not None:
                kind = type(pipe.scheduler)
                pipe.scheduler = kind.from_config(pipe.scheduler.config, timestep_spacing=run.spacing)
            yield pipe
        finally:
            self._pipe.scheduler = own

    def sample(self, pipe: DiffusionPipeline, indices: range, steps: int) -> np.ndarray:
        """The images of these indices, (N, H, W, C) in [0, 1], in one batch."""
        noise = noise_generators(self.settings.seed, indices)
        return np.asarray(
            pipe(batch_size=len(indices), num_inference_steps=steps, generator=noise, output_type="np").images
        )

    @contextmanager
    def bar(self, total: int) -> Iterator[Callable[[], object]]:
        """A bar for this many network evaluations of one batch; yields what to call after each."""
        total *= -(-self.settings.num_images // self.settings.batch_size)
        hidden = not (self._progress and total)
        with tqdm(
            total=total, unit="step", desc=self.doing, disable=hidden, dynamic_ncols=True, mininterval=0.5
        ) as bar:
            yield bar.update

    def _path(self, run: Run, reference: Run) -> Path:
        return self.folder / f"{run.key}-{reference.key}.json"

    def _row(self, labels: Row, run: Run, reference: Run, limit: Run | None) -> Row:
        outcome = cast("Outcome", kept(self._path(run, reference)))
        counted = {"steps": run.steps, "evaluations": outcome["evaluations"], "gbops": outcome["gbops"]}
        row = {**labels, **errors_of(outcome), **counted}
        if limit is not None:
            row["to_limit"] = errors_of(cast("Outcome", kept(self._path(run, limit))))["median"]
        return row

    def _measure(self, run: Run, references: Sequence[Run], advance: Callable[[], object]) -> None:
        compared = [self._reference(reference, advance) for reference in references]
        sampled = self._reference(run, advance) if run == run.reference else self._sampled(run, advance)
        for reference, other in zip(references, compared, strict=True):
            outcome = compare(sampled.images, other.images, sampled.evaluations, sampled.gbops)
            path = self._path(run, reference)
            check_writable(path)
            write_json(path, {**outcome, "run": run.to_dict()})

    def _reference(self, run: Run, advance: Callable[[], object]) -> _Sampled:
        if run.key not in self._references:
            self._references[run.key] = self._sampled(run, advance)
        return self._references[run.key]

    def _sampled(self, run: Run, advance: Callable[[], object]) -> _Sampled:
        """All images of a run; afterwards the layers are what they were."""
        evaluations = 0

        def evaluated(rows: int) -> None:
            nonlocal evaluations
            evaluations += rows
            advance()

        images: list[np.ndarray] = []
        with self.sampling(run) as pipe, ExitStack() as stack:
            report, tally = _prepared(pipe, run, stack)
            stack.enter_context(_counted(pipe, evaluated))
            starts = range(0, self.settings.num_images, self.settings.batch_size)
            for start in starts:
                stop = min(start + self.settings.batch_size, self.settings.num_images)
                images.append(self.sample(pipe, range(start, stop), run.steps))
        evaluations //= self.settings.num_images
        if tally is not None and report is not None:
            gbops = tally.gbops(self.cost, report, evaluations)
        else:
            uncounted = run.exact_first or run.sampler.startswith(PARALLEL)  # each of its batches anchors
            gbops = None if uncounted else trajectory_gbops(self.cost, report, evaluations)
        return _Sampled(np.concatenate(images), evaluations, gbops)


def _prepared(pipe: DiffusionPipeline, run: Run, stack: ExitStack) -> tuple[Report | None, Tally | None]:
    """modiff on the pipeline as the run says, until the stack unwinds."""
    if run.config is None:
        return None, None
    report = apply(pipe, run.config)
    stack.callback(remove, pipe)
    networks = denoisers(pipe)
    if run.exact_first:
        for model in networks.values():
            full_precision_first_step(model)
    if run.skip is None:
        return report, None
    if len(networks) > 1:
        raise ConfigError(
            f"experiments: expected one network, got {', '.join(networks)}. Their layers may have the same names, "
            "and could not be counted apart. Leave out the experiment zero-bits."
        )
    return report, skip_below(next(iter(networks.values())), run.skip)


@contextmanager
def _counted(pipe: DiffusionPipeline, evaluated: Callable[[int], object]) -> Iterator[None]:
    """Call `evaluated` with the rows of each network evaluation."""
    with ExitStack() as observers:
        for model in denoisers(pipe).values():
            observers.enter_context(observe(model, on_step=lambda *call: evaluated(len(call[-1][0]))))
        yield
