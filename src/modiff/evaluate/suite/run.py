"""The suite: draw what is missing of every configuration, judge all of them, and show the layers of one."""

import dataclasses
import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modiff.config import check
from modiff.evaluate.analysis.layers import LayerTrace, LayerTraces
from modiff.evaluate.analysis.watch import watch
from modiff.evaluate.features.extractor import FeatureExtractor, Features
from modiff.evaluate.metrics.bootstrap import small_sample_note
from modiff.evaluate.pipelines import DrawnImages, PipelineSource, aligned, has_static_scales
from modiff.evaluate.report.document import Cell
from modiff.evaluate.suite.extras import Extra
from modiff.evaluate.suite.images import as_bytes, read_reference, reference_digest
from modiff.evaluate.suite.judge import LEAST_IMAGES, RESAMPLES, Judge, Measurement, gather, gather_real, mark_broken
from modiff.evaluate.suite.plans import Plan, Preset, plans_of
from modiff.evaluate.timing import FULL, QUANTIZED
from modiff.files import ResumableFolder, read_tensors, reading, write_tensors
from modiff.generate.environment import Environment, environment
from modiff.progress import Bar

_FORMAT_VERSION = 2
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
_SETS = "FD: {} features, all seeds shared; intervals, notes and all other figures are in --json and --report."
_FOOTNOTE = """\
Relative L2 and PSNR: 8-bit images against full precision. GBOPs and state: of one image. Bit-operations are not speed.
Seconds: all {} images. Integers are simulated in floats, and slower, where a row does not say that it runs on them."""


@dataclass(frozen=True)
class Row:
    """One configuration with all its figures. broken: how many of its images are not finite."""

    plan: Plan
    metrics: tuple[Measurement, ...]
    broken: int = 0

    def metric(self, name: str) -> Measurement | None:
        """The figure of that name; None if this configuration has none."""
        return next((m for m in self.metrics if m["name"] == name), None)


@dataclass(frozen=True)
class Suite:
    """The result. samples: the first images of each row, uint8 (n, H, W, C), from the same seeds."""

    rows: tuple[Row, ...]
    samples: tuple[np.ndarray, ...]
    settings: dict[str, Any]
    environment: Environment

    def table(self) -> str:
        """Name, steps and main figures of each configuration as aligned text, and what the columns mean."""
        figures = [m for row in self.rows for m in row.metrics]
        names = [name for name in COLUMNS if any(m["name"] == name for m in figures)]
        cells = [["", "steps", *(COLUMNS[name][0] for name in names)]]
        for row in self.rows:
            values = {m["name"]: m["value"] for m in row.metrics}
            shown = (Cell.number(values.get(name), COLUMNS[name][1]).text for name in names)
            cells.append([row.plan.name, str(row.plan.steps), *shown])
        count, dimension = self.settings["num_images"], self.settings["extractor_dimension"]
        small = small_sample_note("frechet_distance", count, dimension) if dimension else None
        sets = _SETS.format(self.settings["extractor"]) if dimension else self.settings["extractor_note"]
        footnote = f"{sets}\n{_FOOTNOTE.format(count)}"
        return f"{aligned(cells)}\n\n{footnote}" + (f"\nWarning: {small}" if small else "")

    def to_dict(self, command: Sequence[str]) -> dict[str, Any]:
        """Plain values for JSON, images left out; `command` is what was typed."""
        return {
            "command": shlex.join(command),
            "settings": self.settings,
            "environment": dict(self.environment),
            "configurations": [
                {"name": row.plan.name, "family": row.plan.family, "steps": row.plan.steps,
                 "metrics": list(row.metrics), "config": row.plan.config and row.plan.config.to_dict()}
                for row in self.rows
            ],
        }  # fmt: skip


class Store:
    """A folder for each plan in the folder of one job, with its batches.

    A batch file holds `batch_size` images, the last one of a run what is left, and counts only if it is exactly that
    long: scales that a batch shares depend on what is in it. So a run with more images keeps all full batches.
    """

    def __init__(self, folder: Path, batch_size: int) -> None:
        self.folder, self.batch_size = folder, batch_size

    def missing(self, plan: Plan, num_images: int) -> list[range]:
        """The batches that are still to be drawn, as ranges of sample indices."""
        return [indices for indices in self._batches(num_images) if not self._path(plan, indices).is_file()]

    def save(self, plan: Plan, indices: range, drawn: DrawnImages, features: Features) -> None:
        """Write a batch; it is there whole or not at all."""
        rows = {name: rows for name, rows in features._asdict().items() if rows is not None}
        facts = {name: json.dumps(value) for name, value in drawn._asdict().items() if name != "images"}
        write_tensors(self._path(plan, indices), {"images": torch.from_numpy(drawn.images), **rows}, facts)

    def load(self, plan: Plan, num_images: int) -> Iterator[tuple[DrawnImages, Features]]:
        """All batches in order of the sample index. Raises: FormatError for a file that is damaged."""
        for indices in self._batches(num_images):
            path = self._path(plan, indices)
            what, advice = f"a batch of {len(indices)} images", "Delete it: the next run draws it again."
            tensors, facts = read_tensors(path, what, advice)
            with reading(path, what, advice):
                drawn = DrawnImages(tensors["images"].numpy(), **{name: json.loads(facts[name]) for name in facts})
                features = Features(tensors["pooled"], tensors.get("spatial"), tensors.get("probabilities"))
                if not len(drawn.images) == len(features.pooled) == len(indices):
                    raise ValueError(f"{len(drawn.images)} images with features of {len(features.pooled)}")
            yield drawn, features

    def _batches(self, num_images: int) -> list[range]:
        return [range(i, min(i + self.batch_size, num_images)) for i in range(0, num_images, self.batch_size)]

    def _path(self, plan: Plan, indices: range) -> Path:
        return self.folder / plan.key / f"{indices.start:06d}-{indices.stop:06d}.safetensors"


def run_suite(
    source: PipelineSource,
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
        folder: a batch of images that is finished there is never drawn twice.
        reference: real images, see `read_reference`; of the size that the model draws.
        extras: figures on top of those that are always there; see `load_extras`.
    Raises: ConfigError for settings that mean nothing, a folder of another job or a reference of another size;
        FormatError for files that cannot be read; OSError that names a file. What was finished stays.
    Cost: as many trajectories as configurations; the metrics take seconds each with a small extractor.
    """
    plans = plans_of(chosen)
    sets = extractor.dimension > 0
    why = "Distances to real images are taken between features. Use extractor='classifier', or leave it out."
    check("reference", str(reference), sets or reference is None, "an extractor with it", why)
    fewest = LEAST_IMAGES if sets else 1
    for option, value, least in (("num_images", chosen.num_images, fewest), ("batch_size", batch_size, 1)):
        check(option, value, value >= least, f"{least} or more", f"A distance of sets needs a set. Use {option}=50.")
    extractor(torch.zeros(1, *source.shape, dtype=torch.uint8))  # before the long part: it may not take such images
    for extra in extras:
        extra.check(source.shape)
    present = environment()
    job = {"format_version": _FORMAT_VERSION, **source.settings, "extractor": extractor.name, "batch_size": batch_size,
           "modiff": present["modiff"], "torch": present["torch"]}  # fmt: skip
    digest = None if reference is None else reference_digest(reference, source.shape, LEAST_IMAGES)
    with ResumableFolder(folder, job, record="settings.json"):
        store = Store(folder, batch_size)
        _draw_all(source, extractor, store, plans, chosen.num_images, progress)
        real = None if reference is None else gather_real(read_reference(reference), extractor)
        full = gather(store.load(plans[0], chosen.num_images))
        judge = Judge(extractor, full, real, resamples)
        rows: list[Row] = []
        samples: list[np.ndarray] = []
        for plan in Bar(plans, unit="configuration", desc="metrics", shown=progress):
            images = gather(store.load(plan, chosen.num_images)) if rows else full
            more = [figure for extra in extras for figure in extra.measure(images, full, resamples)]
            rows.append(Row(plan, (*judge.measure(images), *mark_broken(images, more)), images.broken))
            samples.append(images.images[:SAMPLES])
    settings = dataclasses.asdict(chosen) | job | {
        "reference": digest, "resamples": resamples, "metrics": [extra.name for extra in extras],
        "extractor_dimension": extractor.dimension, "extractor_note": extractor.note,
    }  # fmt: skip
    return Suite(tuple(rows), tuple(samples), settings, present)


def _draw_all(source: PipelineSource, extractor: FeatureExtractor, store: Store, plans: Sequence[Plan],
              num_images: int, progress: bool) -> None:  # fmt: skip
    missing = {plan: batches for plan in plans if (batches := store.missing(plan, num_images))}
    parts = [(p.name, FULL if p.config is None else QUANTIZED, p.steps * len(left)) for p, left in missing.items()]
    with source.bar(parts, progress) as bar:
        for plan, batches in missing.items():
            bar.begin(plan.name)
            with source.open(plan.config, plan.steps) as draw:
                for indices in batches:
                    drawn = as_bytes(draw(indices))
                    store.save(plan, indices, drawn, extractor(torch.tensor(drawn.images)))


def watched_layers(
    source: PipelineSource, plans: Sequence[Plan], num_images: int = 4
) -> tuple[Plan, int, list[LayerTrace]] | None:
    """A configuration, `num_images`, and the errors of every layer at every step, fed with full-precision inputs.

    It is the last modulated one with dynamic scales, otherwise the last such one, otherwise None: static scales are
    measured on a modulated model, and layers are watched on the plain one.
    Cost: one trajectory of `num_images`, with each layer's recursion next to it.
    """
    dynamic = [plan for plan in plans if plan.config and not has_static_scales(plan.config)]
    modulated = [plan for plan in dynamic if plan.config and plan.config.layer.modulation]
    plan = (modulated or dynamic or [None])[-1]
    if plan is None or plan.config is None:
        return None
    errors = LayerTraces()
    watch(source.pipe, lambda: source.draw(plan.steps, range(num_images)), plan.config, [errors])
    return plan, num_images, errors.layers()
