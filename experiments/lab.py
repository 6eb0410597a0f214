"""Where the experiments are done: it samples, compares with full precision, and remembers every run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, cast

import numpy as np
from diffusers import DiffusionPipeline
from tqdm import tqdm

from experiments.first_step import full_precision_first_step
from experiments.runs import Outcome, Run, compare, errors_of
from experiments.settings import StudySettings
from experiments.skipping import Tally, skip_below
from experiments.store import Store
from modiff.api import apply, remove
from modiff.config import ModiffConfig
from modiff.errors import ConfigError
from modiff.evaluate.analysis.watch import Watcher, watch
from modiff.evaluate.cost import ModelCost
from modiff.evaluate.pipelines import measure_image
from modiff.evaluate.trajectory_gbops import trajectory_gbops
from modiff.generate.samplers import set_scheduler
from modiff.hosts.diffusers.host import denoisers
from modiff.hosts.diffusers.runs import noise_generators
from modiff.model.report import Report

Row = dict[str, Any]
Plan = Sequence[tuple[Row, Run]]
"""What a row of a table says of itself, and the run behind it."""


class _Sampled(NamedTuple):
    images: np.ndarray
    evaluations: int
    gbops: float | None


class Lab:
    """A pipeline, the study's settings, and its store; the pipeline is unchanged whenever no run is going on.

    Args:
        pipe: unconditional, without modiff.
        progress: a bar on stderr for each experiment, in network evaluations.
    Cost: one step of one image, to count its operations.
    """

    def __init__(self, pipe: DiffusionPipeline, settings: StudySettings, store: Store, *, progress: bool) -> None:
        self._pipe, self.settings, self.store, self._progress = pipe, settings, store, progress
        self.doing = ""
        self._references: dict[str, _Sampled] = {}
        with self.sampling(Run(steps=1)) as ddim:
            self.cost: ModelCost = measure_image(ddim, settings.seed)

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
        todo = {run.key: (run, self._missing(run, reference or run.reference, limit)) for _, run in plan}
        todo = {key: (run, against) for key, (run, against) in todo.items() if against}
        sampled = {r.key: r for run, against in todo.values() for r in (run, *against)}
        with self.bar(sum(run.steps for key, run in sampled.items() if key not in self._references)) as advance:
            for run, against in todo.values():
                self._measure(run, against, advance)
        return [self._row(labels, run, reference or run.reference, limit) for labels, run in plan]

    def watch(self, config: ModiffConfig, watchers: Sequence[Watcher], steps: int) -> Report:
        """Show the watchers one full-precision DDIM trajectory of one batch; see `modiff.evaluate.analysis.watch`."""
        with self.sampling(Run(steps=steps)) as pipe, self.bar(steps) as advance, _counted(pipe, advance):
            count = min(self.settings.num_images, self.settings.batch_size)
            return watch(pipe, lambda: self.sample(pipe, range(count), steps), config, watchers)

    @contextmanager
    def sampling(self, run: Run) -> Iterator[DiffusionPipeline]:
        """The pipeline with the run's sampler and spacing, within the body."""
        own = self._pipe.scheduler
        if run.steps > own.config.num_train_timesteps:
            raise ConfigError(
                f"study: expected at most {own.config.num_train_timesteps} steps, got {run.steps}. The model was "
                "trained on no more. Use --steps 50."
            )
        try:
            pipe = set_scheduler(self._pipe, run.sampler)
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
        """A bar for so many network evaluations of one batch; yields what to call after each."""
        batches = -(-self.settings.num_images // self.settings.batch_size)
        with tqdm(
            total=total * batches,
            unit="step",
            desc=self.doing,
            disable=not (self._progress and total),
            dynamic_ncols=True,
            mininterval=0.5,
        ) as bar:
            yield bar.update

    def _row(self, labels: Row, run: Run, reference: Run, limit: Run | None) -> Row:
        outcome = self._kept(run, reference)
        row = {
            **labels,
            **errors_of(outcome),
            "steps": run.steps,
            "evaluations": outcome["evaluations"],
            "gbops": outcome["gbops"],
        }
        return row if limit is None else {**row, "to_limit": errors_of(self._kept(run, limit))["median"]}

    def _missing(self, run: Run, reference: Run, limit: Run | None) -> list[Run]:
        wanted = [reference] if limit is None else [reference, limit]
        return [other for other in wanted if self.store.run(f"{run.key}-{other.key}") is None]

    def _kept(self, run: Run, reference: Run) -> Outcome:
        return cast("Outcome", self.store.run(f"{run.key}-{reference.key}"))

    def _measure(self, run: Run, against: Sequence[Run], advance: Callable[[], object]) -> None:
        wanted = [self._reference(reference, advance) for reference in against]
        found = self._reference(run, advance) if run == run.reference else self._sampled(run, advance)
        for reference, other in zip(against, wanted, strict=True):
            outcome = compare(found.images, other.images, found.evaluations, found.gbops)
            self.store.save_run(f"{run.key}-{reference.key}", {**outcome, "run": run.to_dict()})

    def _reference(self, run: Run, advance: Callable[[], object]) -> _Sampled:
        if run.key not in self._references:
            self._references[run.key] = self._sampled(run, advance)
        return self._references[run.key]

    def _sampled(self, run: Run, advance: Callable[[], object]) -> _Sampled:
        """All images of a run, with the layers as before at the end."""
        evaluations = 0

        def evaluated() -> None:
            nonlocal evaluations
            evaluations += 1
            advance()

        images: list[np.ndarray] = []
        with self.sampling(run) as pipe, ExitStack() as stack:
            report, tally = _prepared(pipe, run, stack)
            stack.enter_context(_counted(pipe, evaluated))
            starts = range(0, self.settings.num_images, self.settings.batch_size)
            for start in starts:
                stop = min(start + self.settings.batch_size, self.settings.num_images)
                images.append(self.sample(pipe, range(start, stop), run.steps))
        evaluations //= len(starts)
        return _Sampled(np.concatenate(images), evaluations, self._gbops(run, report, tally, evaluations))

    def _gbops(self, run: Run, report: Report | None, tally: Tally | None, evaluations: int) -> float | None:
        """Bit-operations of one image; of silent layers only what they sent."""
        if run.exact_first:
            return None
        if tally is None or report is None:
            return trajectory_gbops(self.cost, report, evaluations)
        return skipping_gbops(self.cost, report, tally, evaluations)


def skipping_gbops(cost: ModelCost, report: Report, tally: Tally, evaluations: int) -> float:
    """As `trajectory_gbops`, with layers counted as often as they ran: starts at 32 bits, codes at their own.

    A layer at 0 bits sends floats where it sends: 32 bits.
    """
    taken: Mapping[str, Any] = {entry.name: entry.config for entry in report.taken}
    total = 0.0
    for layer in cost.layers:
        config = taken.get(layer.name)
        if config is None:
            total += evaluations * layer.bops(None, None)
            continue
        starts, sent = tally.shares(layer.name)
        bits = config.activation.bits or None
        total += evaluations * (
            starts * layer.bops(config.weight.bits, None) + sent * layer.bops(config.weight.bits, bits)
        )
    return total / 1e9


def _prepared(pipe: DiffusionPipeline, run: Run, stack: ExitStack) -> tuple[Report | None, Tally | None]:
    """modiff on the pipeline as the run says, until the stack unwinds."""
    if run.config is None:
        return None, None
    report = apply(pipe, run.config)
    stack.callback(remove, pipe)
    networks = list(denoisers(pipe).values())
    if run.exact_first:
        for model in networks:
            full_precision_first_step(model)
    if run.skip is None:
        return report, None
    if len(networks) > 1:
        raise ConfigError(
            f"study: expected one network, got {', '.join(denoisers(pipe))}. Their layers may have the same names, "
            "and could not be counted apart. Leave out the experiment zero-bits."
        )
    return report, skip_below(networks[0], run.skip)


@contextmanager
def _counted(pipe: DiffusionPipeline, evaluated: Callable[[], object]) -> Iterator[None]:
    """Call `evaluated` after each network evaluation."""
    with ExitStack() as hooks:
        for model in denoisers(pipe).values():
            hooks.callback(model.register_forward_hook(lambda *_: _none(evaluated())).remove)
        yield


def _none(_: object) -> None:
    """A forward hook's result would replace the network's output."""
