"""What `modiff evaluate` runs: every configuration on the same seeds, judged against full precision and real images."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from modiff.errors import ConfigError, FormatError
from modiff.evaluate.features.protocol import FeatureExtractor, note_of
from modiff.evaluate.metrics.bootstrap import small_sample_note
from modiff.evaluate.suite_extras import Extra
from modiff.evaluate.suite_images import Drawn, ImageSource, Session
from modiff.evaluate.suite_metrics import LEAST_IMAGES, RESAMPLES, ImageSet, Judge, Measurement, gather, told_broken
from modiff.evaluate.suite_plans import Plan, Preset, plans_of
from modiff.evaluate.suite_reference import read_reference, reference_digest
from modiff.evaluate.suite_store import Batch, Store
from modiff.evaluate.suite_table import text_table
from modiff.generate.environment import Environment, environment

ROWS = 2
"""Counts up when the names or definitions of the figures change, so that rows kept before are computed anew."""
SAMPLES = 8
"""Images of each configuration that the result holds, to be looked at."""


@dataclass(frozen=True)
class Row:
    """One configuration with all its figures."""

    plan: Plan
    gbops: float
    metrics: tuple[Measurement, ...]

    def metric(self, name: str) -> Measurement | None:
        """The figure of that name; None if this configuration has none."""
        return next((m for m in self.metrics if m["name"] == name), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plan = self.plan
        config = None if plan.config is None else plan.config.to_dict()
        return {"name": plan.name, "family": plan.family, "steps": plan.steps, "metrics": list(self.metrics),
                "config": config}  # fmt: skip


@dataclass(frozen=True)
class Suite:
    """The result. samples: the first images of each row, uint8 (n, H, W, C), from the same seeds."""

    rows: tuple[Row, ...]
    samples: tuple[np.ndarray, ...]
    settings: dict[str, Any]
    environment: Environment

    def table(self) -> str:
        """The main figures as aligned text, and what too few images do to the distances."""
        table = text_table([(row.plan.name, row.plan.steps, row.metrics) for row in self.rows])
        small = small_sample_note("frechet_distance", self.settings["num_images"], self.settings["extractor_dimension"])
        return table if small is None else f"{table}\nWarning: {small}"

    def to_dict(self, command: Sequence[str]) -> dict[str, Any]:
        """Plain values for JSON, images left out; `command` is what was typed."""
        return {
            "command": shlex.join(command),
            "settings": self.settings,
            "environment": dict(self.environment),
            "configurations": [row.to_dict() for row in self.rows],
        }


def run_suite(
    source: ImageSource,
    extractor: FeatureExtractor,
    chosen: Preset,
    folder: Path,
    *,
    reference: Path | None = None,
    extras: Sequence[Extra] = (),
    batch_size: int = 50,
    resamples: int = RESAMPLES,
    progress: bool = True,
) -> Suite:
    """Draw every configuration's images, or take up where an earlier run in `folder` stopped, and judge them.

    Args:
        source: draws the images, for example a PipelineSource. chosen: how many, how many steps, which configs.
        folder: kept: a batch or a row that is finished is never computed twice.
        reference: real images, see `read_reference`; of the size that the model draws.
        extras: figures beside those that are always there; see `load_extras`.
        resamples: of the bootstrap intervals.
        progress: a bar on stderr, in images of full precision with all its steps.
    Raises: ConfigError for settings that mean nothing, a folder of another job or a reference of another size;
        FormatError for files that cannot be read; OSError that names a file. What was finished is kept.
    Cost: as many trajectories as configurations; the metrics take seconds each with a small extractor.
    """
    plans = plans_of(chosen)
    _check(chosen, batch_size)
    extractor(torch.zeros(1, *source.shape, dtype=torch.uint8))  # before the long part: it may not take such images
    for extra in extras:
        extra.check(source.shape)
    present = environment()
    shaping = {"extractor": extractor.name, "batch_size": batch_size, "modiff": present["modiff"],
               "torch": present["torch"]}  # fmt: skip
    store = Store(folder, source.settings | shaping)
    real = None if reference is None else _checked_reference(reference, source.shape)
    gbops = _draw_all(source, extractor, store, plans, chosen, progress)
    samples = tuple(next(store.load(plan, chosen.num_images)).images[:SAMPLES] for plan in plans)
    depends_on = {"rows": ROWS, "num_images": chosen.num_images, "full": plans[0].key, "reference": real}
    depends_on |= {"resamples": resamples, "extras": [extra.name for extra in extras]}
    kept = [store.row(plan, depends_on) for plan in plans]
    if not all(kept):
        data = None if reference is None else _reference_set(reference, extractor)
        full = gather(store.load(plans[0], chosen.num_images))
        judge = Judge(extractor, full, data, resamples)
        for i, plan in enumerate(tqdm(plans, unit="configuration", desc="metrics", disable=not progress)):
            if kept[i] is None:
                found = full if i == 0 else gather(store.load(plan, chosen.num_images))
                row = {"metrics": _measured(judge, extras, found, gbops[i])}
                store.save_row(plan, depends_on, row)
                kept[i] = row
    rows = [Row(plan, g, tuple(row["metrics"])) for plan, g, row in zip(plans, gbops, kept, strict=True) if row]
    settings = dataclasses.asdict(chosen) | store.settings | {"reference": real, "resamples": resamples}
    settings |= {
        "metrics": [extra.name for extra in extras],
        "extractor_dimension": extractor.dimension,
        "extractor_note": note_of(extractor),
    }
    return Suite(tuple(rows), samples, settings, present)


def _measured(judge: Judge, extras: Sequence[Extra], found: ImageSet, gbops: float) -> list[Measurement]:
    """All figures of a configuration, those of the extras last."""
    rows = judge.measure(found, gbops)
    more = [row for extra in extras for row in extra.measure(found, judge.full, judge.resamples)]
    return [*rows, *told_broken(found, more)]


def _check(chosen: Preset, batch_size: int) -> None:
    for option, value, least in (("--num-images", chosen.num_images, LEAST_IMAGES), ("--batch-size", batch_size, 1)):
        if value < least:
            raise ConfigError(
                f"{option}: expected {least} or more, got {value}. A distance of sets needs a set, and a batch images. "
                f"Use {option} 50."
            )


def _draw_all(source: ImageSource, extractor: FeatureExtractor, store: Store, plans: Sequence[Plan], chosen: Preset,
              progress: bool) -> list[float]:  # fmt: skip
    """Draw what is missing of every plan; the bit-operations of each."""
    missing = {plan: store.missing(plan, chosen.num_images) for plan in plans}
    total = sum(plan.steps * len(batches) for plan, batches in missing.items())
    gbops: list[float] = []
    with tqdm(total=total, unit="step", disable=not progress, dynamic_ncols=True, mininterval=0.5) as bar:
        for plan, batches in missing.items():
            bar.set_description(plan.name)
            known = store.gbops(plan)
            if batches or known is None:
                with source.open(plan, bar.update) as session:
                    _draw_plan(session, extractor, store, plan, batches, bar)
                    known = session.gbops
                store.save_gbops(plan, known)
            gbops.append(known)
    return gbops


def _draw_plan(session: Session, extractor: FeatureExtractor, store: Store, plan: Plan, batches: Sequence[range],
               bar: tqdm[Any]) -> None:  # fmt: skip
    """Draw, judge and keep the batches of one plan."""
    for indices in batches:
        before = bar.n
        drawn = session.draw(indices)
        store.save(plan, indices, _features(extractor, drawn))
        bar.update(before + plan.steps - bar.n)  # samplers may evaluate more or less often than once in a step


def _features(extractor: FeatureExtractor, drawn: Drawn) -> Batch:
    found = extractor(torch.tensor(drawn.images))
    return Batch(
        images=drawn.images, pooled=_array(found.pooled), spatial=_optional(found.spatial),
        probabilities=_optional(found.probabilities), seconds=drawn.seconds, state_bytes=drawn.state_bytes,
        broken=drawn.broken,
    )  # fmt: skip


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().float().numpy()


def _optional(tensor: torch.Tensor | None) -> np.ndarray | None:
    return None if tensor is None else _array(tensor)


def _checked_reference(path: Path, shape: tuple[int, ...]) -> str:
    """The digest of the reference, if its images fit those of the model and are enough."""
    sizes = [images.shape for images in read_reference(path)]
    if sizes[0][1:] != shape:
        raise FormatError(
            f"{path}: expected images of {' x '.join(map(str, shape))} like those of the model, got "
            f"{' x '.join(map(str, sizes[0][1:]))}. Features change with the size. Pad or resize the images as the "
            "model's training did."
        )
    if sum(size[0] for size in sizes) < LEAST_IMAGES:
        raise FormatError(
            f"{path}: expected {LEAST_IMAGES} images or more, got {sum(size[0] for size in sizes)}. A distance of sets "
            "needs a set. Give more images."
        )
    return reference_digest(path)


def _reference_set(path: Path, extractor: FeatureExtractor) -> ImageSet:
    """The features of real images; the images themselves are not kept."""
    return gather((_features(extractor, Drawn(images, 0.0, 0, 0)) for images in read_reference(path)), images=False)
