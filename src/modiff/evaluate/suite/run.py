"""The suite: draw what is missing of every configuration, judge all of them, and show the layers of one."""

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

from modiff.errors import ConfigError
from modiff.evaluate.analysis.layers import LayerTrace, LayerTraces
from modiff.evaluate.analysis.watch import has_static_scales, watch
from modiff.evaluate.features.extractor import FeatureExtractor, note_of
from modiff.evaluate.metrics.bootstrap import small_sample_note
from modiff.evaluate.suite.extras import Extra
from modiff.evaluate.suite.images import (
    DrawnImages,
    ImageSource,
    PipelineSource,
    Session,
    check_reference,
    read_reference,
)
from modiff.evaluate.suite.judge import LEAST_IMAGES, RESAMPLES, ImageSet, Judge, Measurement, gather, mark_broken
from modiff.evaluate.suite.plans import Plan, Preset, plans_of
from modiff.evaluate.suite.store import SavedBatch, Store
from modiff.evaluate.table import aligned, number
from modiff.files import ResumableFolder
from modiff.generate.environment import Environment, environment

_FORMAT_VERSION = 1
ROWS = 2
"""Counts up when the names or definitions of the figures change, so that rows of earlier runs are computed again."""
SAMPLES = 8
"""Images of each configuration that the result holds, to be looked at."""
COLUMNS = {
    "fd_to_reference": ("FD to reference", ".4g"),
    "fd_to_full_precision": ("FD to full precision", ".4g"),
    "relative_l2": ("rel. L2", ".4f"),
    "psnr_db": ("PSNR dB", ".1f"),
    "gbops": ("GBOPs", ".4g"),
    "state_mib": ("state MiB", ".2f"),
    "seconds": ("seconds", ".1f"),
}
_FOOTNOTE = """\
FD: {extractor} features, all seeds shared; intervals, notes and all other figures are in --json and --report.
Relative L2 and PSNR: 8-bit images against full precision. GBOPs and state: of one image. Bit-operations are not speed.
Seconds: all {n} images. Integers are simulated in floats, and slower, where a row does not say that it runs on them."""


@dataclass(frozen=True)
class Row:
    """One configuration with all its figures."""

    plan: Plan
    metrics: tuple[Measurement, ...]

    def metric(self, name: str) -> Measurement | None:
        """The figure of that name; None if this configuration has none."""
        return next((m for m in self.metrics if m["name"] == name), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        config = None if self.plan.config is None else self.plan.config.to_dict()
        return {"name": self.plan.name, "family": self.plan.family, "steps": self.plan.steps,
                "metrics": list(self.metrics), "config": config}  # fmt: skip


@dataclass(frozen=True)
class Suite:
    """The result. samples: the first images of each row, uint8 (n, H, W, C), from the same seeds."""

    rows: tuple[Row, ...]
    samples: tuple[np.ndarray, ...]
    settings: dict[str, Any]
    environment: Environment

    def table(self) -> str:
        """The main figures as aligned text, and what too few images do to the distances."""
        small = small_sample_note("frechet_distance", self.settings["num_images"], self.settings["extractor_dimension"])
        return text_table(self.rows) + (f"\nWarning: {small}" if small else "")

    def to_dict(self, command: Sequence[str]) -> dict[str, Any]:
        """Plain values for JSON, images left out; `command` is what was typed."""
        return {
            "command": shlex.join(command),
            "settings": self.settings,
            "environment": dict(self.environment),
            "configurations": [row.to_dict() for row in self.rows],
        }


def text_table(rows: Sequence[Row]) -> str:
    """Name, steps and main figures of each configuration, aligned, with what the columns mean below."""
    figures = [m for row in rows for m in row.metrics]
    names = [name for name in COLUMNS if any(m["name"] == name for m in figures)]
    cells = [["", "steps", *(COLUMNS[name][0] for name in names)]]
    for row in rows:
        shown = ((row.metric(name) or {"value": None}, COLUMNS[name][1]) for name in names)
        cells.append([row.plan.name, str(row.plan.steps), *(number(m["value"], form) for m, form in shown)])
    extractor = next((m["extractor"] for m in figures if m["extractor"]), "no")
    return f"{aligned(cells)}\n\n{_FOOTNOTE.format(extractor=extractor, n=max(m['n'] for m in figures))}"


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
    """Draw every configuration's images, or go on where an earlier run in `folder` stopped, and judge them.

    Args:
        source: draws the images, for example a PipelineSource. chosen: how many, how many steps, which configs.
        folder: a batch or a row that is finished there is never computed twice.
        reference: real images, see `read_reference`; of the size that the model draws.
        extras: figures on top of those that are always there; see `load_extras`.
        resamples: of the bootstrap intervals.
        progress: a bar on stderr, in images of full precision with all its steps.
    Raises: ConfigError for settings that mean nothing, a folder of another job or a reference of another size;
        FormatError for files that cannot be read; OSError that names a file. What was finished stays.
    Cost: as many trajectories as configurations; the metrics take seconds each with a small extractor.
    """
    plans = plans_of(chosen)
    for option, value, least in (("--num-images", chosen.num_images, LEAST_IMAGES), ("--batch-size", batch_size, 1)):
        if value < least:
            raise ConfigError(
                f"{option}: expected {least} or more, got {value}. A distance of sets needs a set, and a batch images. "
                f"Use {option} 50."
            )
    extractor(torch.zeros(1, *source.shape, dtype=torch.uint8))  # before the long part: it may not take such images
    for extra in extras:
        extra.check(source.shape)
    present = environment()
    job = {"format_version": _FORMAT_VERSION, **source.settings, "extractor": extractor.name, "batch_size": batch_size,
           "modiff": present["modiff"], "torch": present["torch"]}  # fmt: skip
    with ResumableFolder(folder, job, record="settings.json"):
        store = Store(folder, batch_size)
        real = None if reference is None else check_reference(reference, source.shape, LEAST_IMAGES)
        gbops = _draw_all(source, extractor, store, plans, chosen, progress)
        samples = tuple(next(store.load(plan, chosen.num_images)).images[:SAMPLES] for plan in plans)
        depends_on = {"rows": ROWS, "num_images": chosen.num_images, "full": plans[0].key, "reference": real,
                      "resamples": resamples, "extras": [extra.name for extra in extras]}  # fmt: skip
        metrics = _judge_all(
            extractor, store, dict(zip(plans, gbops, strict=True)), reference, extras, depends_on, progress
        )
    rows = [Row(plan, tuple(figures)) for plan, figures in zip(plans, metrics, strict=True)]
    settings = dataclasses.asdict(chosen) | job | {
        "reference": real, "resamples": resamples, "metrics": [extra.name for extra in extras],
        "extractor_dimension": extractor.dimension, "extractor_note": note_of(extractor),
    }  # fmt: skip
    return Suite(tuple(rows), samples, settings, present)


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
    """Draw and save the batches of one plan, with their features."""
    for indices in batches:
        start = bar.n
        store.save(plan, indices, _batch(extractor, session.draw(indices)))
        bar.update(start + plan.steps - bar.n)  # samplers may evaluate more or less often than once in a step


def _batch(extractor: FeatureExtractor, drawn: DrawnImages) -> SavedBatch:
    rows = extractor(torch.tensor(drawn.images))
    pooled, spatial, probabilities = (None if row is None else row.detach().cpu().float().numpy() for row in rows)
    return SavedBatch(drawn.images, np.asarray(pooled), spatial, probabilities, drawn.seconds, drawn.state_bytes,
                 drawn.broken)  # fmt: skip


def _reference_set(path: Path, extractor: FeatureExtractor) -> ImageSet:
    """The features of real images; the images themselves are not kept in memory."""
    return gather((_batch(extractor, DrawnImages(images, 0.0, 0, 0)) for images in read_reference(path)), images=False)


def _judge_all(
    extractor: FeatureExtractor,
    store: Store,
    gbops: dict[Plan, float],
    reference: Path | None,
    extras: Sequence[Extra],
    depends_on: dict[str, Any],
    progress: bool,
) -> list[list[Measurement]]:
    """The figures of every plan, those of the extras last; computed only where the store has none."""
    rows = {plan: store.row(plan, depends_on) for plan in gbops}
    if not all(rows.values()):
        count = depends_on["num_images"]
        data = None if reference is None else _reference_set(reference, extractor)
        full = gather(store.load(next(iter(gbops)), count))
        judge = Judge(extractor, full, data, depends_on["resamples"])
        for i, (plan, row) in enumerate(tqdm(rows.items(), unit="configuration", desc="metrics", disable=not progress)):
            if row is None:
                images = full if i == 0 else gather(store.load(plan, count))
                more = [figure for extra in extras for figure in extra.measure(images, full, judge.resamples)]
                rows[plan] = {"metrics": [*judge.measure(images, gbops[plan]), *mark_broken(images, more)]}
                store.save_row(plan, depends_on, rows[plan])
    return [row["metrics"] for row in rows.values() if row]


def watched_plan(plans: Sequence[Plan]) -> Plan | None:
    """The configuration whose layers are shown: the last modulated one with dynamic scales, else the last such one.

    None if there is none: static scales are measured on a modulated model, and layers are watched on the plain one.
    """
    dynamic = [plan for plan in plans if plan.config is not None and not has_static_scales(plan.config)]
    modulated = [plan for plan in dynamic if plan.config is not None and plan.config.layer.modulation is not None]
    return (modulated or dynamic or [None])[-1]


def layer_errors(source: PipelineSource, plan: Plan, *, num_images: int = 4) -> list[LayerTrace]:
    """The errors of every layer at every step, layers fed with their full-precision inputs.

    Args:
        source: its pipeline must be without modiff. plan: one with a config.
    Cost: one trajectory of `num_images`, with each layer's recursion next to it.
    """
    if plan.config is None:
        return []
    errors = LayerTraces()
    watch(source.pipe, lambda: source.run(plan.steps, range(num_images)), plan.config, [errors])
    return errors.layers()
