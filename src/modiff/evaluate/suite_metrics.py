"""The figures of one configuration: every metric with its extractor, number of images, interval and what to know."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from modiff.evaluate.features.names import Metric, result_name
from modiff.evaluate.features.protocol import FeatureExtractor, note_of
from modiff.evaluate.metrics.bootstrap import Kind, bootstrap, small_sample_note
from modiff.evaluate.metrics.frechet import Moments, frechet_interval
from modiff.evaluate.metrics.paired import WINDOW, paired_errors
from modiff.evaluate.metrics.sets import inception_score, kernel_distance, within_manifold
from modiff.evaluate.suite_store import Batch

RESAMPLES = 200
LARGEST_RESAMPLED, FEW_RESAMPLES = 256, 20
"""Feature dimensions up to which a Frechet distance gets all resamples, and how many above: seconds each at 2048."""
SUBSETS, SUBSET_SIZE = 100, 1000
NEIGHBOURS, MANIFOLD = 3, 10_000
DATA, FULL = "reference", "full_precision"

LEAST_IMAGES = 2 * (NEIGHBOURS + 1)
_AGAINST = {DATA: "reference", FULL: "full precision"}
_NAMES: dict[Metric, str] = {
    "frechet_distance": "fd", "to_full_precision": "fd", "spatial_frechet_distance": "spatial_fd",
    "kernel_distance": "kernel_distance", "inception_score": "score", "precision": "precision", "recall": "recall",
}  # fmt: skip
"""Keys for programs, the same for every extractor, so none of them says FID, KID or Inception: the labels do."""

SAME_SEEDS = "Same seeds: the sets are dependent, which lowers the value; an unchanged model is at 0."
PAIRED = "Image i of both from seed i; 8-bit images, all pixels together."
GBOPS = (
    "MACs x weight bits x activation bits of one image, all steps. Layers in full precision and attention products "
    "count 32 x 32. Bit-operations are not speed."
)
STATE = "Input and output states at the end of the trajectory, measured; per image."
SECONDS = "Wall time of the denoising of all images. Simulated integers are not faster."


class Measurement(TypedDict):
    """A figure. name: for programs. label: for people; FID only with Inception, else FD with the extractor's name.

    extractor: None where none is involved. value None: not measured, or not finite; the note says why. n: images behind
    it. low, high: 95 % interval, None where there is none.
    """

    name: str
    label: str
    extractor: str | None
    value: float | None
    n: int
    low: float | None
    high: float | None
    note: str


@dataclass
class ImageSet:
    """All images of a configuration, or a set of real ones, as the metrics need them. N images, D features.

    pooled (N, D) float32. spatial: moments of the spatial rows. images: uint8 (N, H, W, C), spatial_rows (N, D2)
    float32: None for real ones, which are neither shown nor resampled.
    """

    pooled: Tensor
    spatial: Moments | None
    probabilities: Tensor | None
    images: np.ndarray | None
    seconds: float = 0.0
    state_bytes_per_image: float = 0.0
    broken: int = 0
    spatial_rows: Tensor | None = None

    def __len__(self) -> int:
        return len(self.pooled)


def gather(batches: Iterable[Batch], *, images: bool = True) -> ImageSet:
    """One set from batches. Memory: its pooled features, with `images` also these and the spatial rows."""
    pooled: list[np.ndarray] = []
    probabilities: list[np.ndarray] = []
    kept: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    spatial: Moments | None = None
    seconds, state, broken = 0.0, 0.0, 0
    for batch in batches:
        pooled.append(batch.pooled)
        if batch.probabilities is not None:
            probabilities.append(batch.probabilities)
        if batch.spatial is not None:
            spatial = spatial or Moments(batch.spatial.shape[1])
            spatial.update(torch.from_numpy(batch.spatial))
            rows += [batch.spatial] if images else []
        if images:
            kept.append(batch.images)
        seconds += batch.seconds
        state = max(state, batch.state_bytes / len(batch.images))
        broken += batch.broken
    return ImageSet(
        pooled=torch.from_numpy(np.concatenate(pooled)),
        spatial=spatial,
        probabilities=torch.from_numpy(np.concatenate(probabilities)) if probabilities else None,
        images=np.concatenate(kept) if images else None,
        seconds=seconds, state_bytes_per_image=state, broken=broken,
        spatial_rows=torch.from_numpy(np.concatenate(rows)) if rows else None,
    )  # fmt: skip


@dataclass(frozen=True)
class Judge:
    """What configurations are judged with: full precision, and real images if there are any."""

    extractor: FeatureExtractor
    full: ImageSet
    reference: ImageSet | None = None
    resamples: int = RESAMPLES

    def measure(self, found: ImageSet, gbops: float) -> list[Measurement]:
        """All figures of a configuration; those to full precision only if it is not full precision itself."""
        rows: list[Measurement] = []
        if found is not self.full:
            rows += [*self._frechet(found, self.full, FULL), *self._sets(found, self.full, FULL), *self._paired(found)]
        else:
            rows += self._halves(found)
        if self.reference is not None:
            rows += [*self._frechet(found, self.reference, DATA), *self._sets(found, self.reference, DATA)]
        rows += [*self._inception(found), *_costs(found, gbops)]
        return told_broken(found, rows)

    def _row(self, metric: Metric, against: str | None, value: float | None, n: int, note: str | None,
             low: float | None = None, high: float | None = None) -> Measurement:  # fmt: skip
        """The row of a metric of features, named after the extractor."""
        name, label = _NAMES[metric], result_name(metric, self.extractor)
        if against is not None:
            name = f"{name}_to_{against}"
            label = label if metric == "to_full_precision" else f"{label} to {_AGAINST[against]}"
        note = _join(note, note_of(self.extractor))
        return measurement(name, label, self.extractor.name, value, n, note, low, high)

    def _frechet(self, found: ImageSet, other: ImageSet, against: str) -> list[Measurement]:
        """Frechet distances of pooled and, where there are any, of spatial features."""
        metric: Metric = "to_full_precision" if against == FULL else "frechet_distance"
        theirs = other.pooled if against == FULL else Moments.of(other.pooled)
        rows = [self._distance(metric, found.pooled, theirs, against)]
        spatial = other.spatial_rows if against == FULL else other.spatial
        if found.spatial_rows is not None and spatial is not None:
            rows.append(self._distance("spatial_frechet_distance", found.spatial_rows, spatial, against))
        return rows

    def _distance(self, metric: Metric, rows: Tensor, other: Tensor | Moments, against: str) -> Measurement:
        """One Frechet distance: paired to full precision, to a reference that is not resampled otherwise."""
        resamples, kind, effort = self._effort(rows.shape[1])
        if isinstance(other, Tensor):
            distance = frechet_interval(rows, other, resamples=resamples, kind=kind, draw="paired")
            note = _join(SAME_SEEDS, small_sample_note("frechet_distance", len(rows), rows.shape[1]))
        else:
            distance = frechet_interval(rows, other, resamples=resamples, kind=kind)
            small = small_sample_note("frechet_distance", min(len(rows), other.count), rows.shape[1])
            note = _join(f"To {other.count} images of the reference data, which are not resampled.", small)
        return self._row(metric, against, distance["estimate"], len(rows), _join(note, effort), distance["low"],
                         distance["high"])  # fmt: skip

    def _effort(self, dimension: int) -> tuple[int, Kind, str | None]:
        """Resamples that a Frechet distance can pay for, the interval that they allow, and what to say of it."""
        if dimension <= LARGEST_RESAMPLED:
            return self.resamples, "centred", None
        few = min(self.resamples, FEW_RESAMPLES)
        return few, "normal", f"Interval: 1.96 standard deviations over {few} resamples, as one takes long."

    def _sets(self, found: ImageSet, other: ImageSet, against: str) -> list[Measurement]:
        """Kernel distance, precision and recall."""
        smaller = min(len(found), len(other))
        size = min(SUBSET_SIZE, smaller // 2)
        kernel, deviation = kernel_distance(found.pooled, other.pooled, subsets=SUBSETS, subset_size=size)
        # Subsets of m out of n without replacement: Var(n) = Var(m) m / (n - m), the delete-d jackknife.
        spread = 1.96 * deviation * math.sqrt(size / (smaller - size))
        note = f"{SUBSETS} subsets of {size}; interval by the delete-d jackknife, as for independent sets."
        ends = kernel - spread, kernel + spread
        rows = [self._row("kernel_distance", against, kernel, len(found), note, *ends)]
        real, made = other.pooled[:MANIFOLD], found.pooled[:MANIFOLD]
        small = small_sample_note("precision_recall", min(len(real), len(made)))
        shares: tuple[tuple[Metric, Tensor, Tensor], ...] = (("precision", made, real), ("recall", real, made))
        for metric, queries, manifold in shares:
            inside = within_manifold(queries, manifold, neighbours=NEIGHBOURS).double()
            share = bootstrap(_mean, [inside], resamples=self.resamples)
            note = _join(f"{NEIGHBOURS} neighbours; {len(queries)} images in the manifold of {len(manifold)}.", small)
            rows.append(self._row(metric, against, share["estimate"], len(made), note, share["low"], share["high"]))
        return rows

    def _inception(self, found: ImageSet) -> list[Measurement]:
        """The score of all images as one part."""
        if found.probabilities is None:
            return []
        score = bootstrap(
            inception_score,
            [found.probabilities.double()],
            resamples=self.resamples,
            kind="centred",
        )
        note = _join("One split.", small_sample_note("inception_score", len(found), found.probabilities.shape[1]))
        return [self._row("inception_score", None, score["estimate"], len(found), note, score["low"], score["high"])]

    def _halves(self, full: ImageSet) -> list[Measurement]:
        """How far two sets of the same model are apart, each of half the images."""
        half = len(full) // 2
        if half < 2:
            return []
        resamples, kind, effort = self._effort(full.pooled.shape[1])
        found = frechet_interval(full.pooled[:half], full.pooled[half : 2 * half], resamples=resamples, kind=kind)
        said = f"Two halves of {half} images of full precision, other seeds: what sampling alone makes at this n."
        small = small_sample_note("frechet_distance", half, full.pooled.shape[1])
        note = _join(said, small, effort, note_of(self.extractor))
        label = f"{result_name('frechet_distance', self.extractor)} between halves"
        return [measurement("fd_between_halves", label, self.extractor.name, found["estimate"], half, note,
                             found["low"], found["high"])]  # fmt: skip

    def _paired(self, found: ImageSet) -> list[Measurement]:
        """Against full precision, image by image."""
        if found.images is None or self.full.images is None:
            return []
        errors = paired_errors(found.images, self.full.images, resamples=self.resamples)
        note = _join(PAIRED, errors["note"])
        rows: list[Measurement] = []
        for name, label in (("relative_l2", "relative L2"), ("psnr_db", "PSNR dB"), ("ssim", "SSIM")):
            interval = errors[name]
            if interval is None:
                small = f"The images are smaller than its window of {WINDOW} pixels."
                rows.append(measurement(name, label, None, None, errors["n"], small))
                continue
            equal = name == "psnr_db" and interval["estimate"] is None
            said = _join("Infinite: all images are equal to full precision." if equal else None, note)
            rows.append(measurement(name, label, None, interval["estimate"], errors["n"], said, interval["low"],
                                     interval["high"]))  # fmt: skip
        return rows


def _costs(found: ImageSet, gbops: float) -> list[Measurement]:
    state = found.state_bytes_per_image / 2**20
    return [
        measurement("gbops", "GBOPs", None, gbops, 1, GBOPS),
        measurement("state_mib", "state MiB", None, state, len(found), STATE),
        measurement("seconds", "seconds", None, found.seconds, len(found), SECONDS),
    ]


def told_broken(found: ImageSet, rows: list[Measurement]) -> list[Measurement]:
    """The rows of a configuration, each told of images that were not finite, if there were any."""
    if not found.broken:
        return rows
    warning = f"{found.broken} of {len(found)} images were not finite and count as black."
    return [{**row, "note": f"{warning} {row['note']}".strip()} for row in rows]


def measurement(name: str, label: str, extractor: str | None, value: float | None, n: int, note: str | None,
                 low: float | None = None, high: float | None = None) -> Measurement:  # fmt: skip
    """A row of plain values: what is not finite becomes None."""
    value, low, high = (None if x is None or not math.isfinite(x) else float(x) for x in (value, low, high))
    return {"name": name, "label": label, "extractor": extractor, "value": value, "n": n, "low": low, "high": high,
            "note": note or ""}  # fmt: skip


def _mean(values: Tensor) -> float:
    return float(values.mean())


def _join(*sentences: str | None) -> str:
    return " ".join(sentence for sentence in sentences if sentence)
