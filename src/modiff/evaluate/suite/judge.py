"""The figures of one configuration: every metric with its extractor, number of images, interval and what to know."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from modiff.evaluate.features.extractor import FeatureExtractor, Features, joined
from modiff.evaluate.features.load import result_name
from modiff.evaluate.metrics.bootstrap import Draw, Interval, bootstrap, small_sample_note
from modiff.evaluate.metrics.frechet import Moments, frechet_interval
from modiff.evaluate.metrics.paired import WINDOW, paired_errors
from modiff.evaluate.metrics.sets import inception_score, kernel_distance, within_manifold
from modiff.evaluate.pipelines import DrawnImages

RESAMPLES = 200
LARGEST_RESAMPLED, FEW_RESAMPLES = 256, 20
"""Feature dimensions up to which a Frechet distance gets all resamples, and how many above: seconds each at 2048."""
SUBSETS, SUBSET_SIZE = 100, 1000
NEIGHBOURS, MANIFOLD = 3, 10_000
LEAST_IMAGES = 2 * (NEIGHBOURS + 1)

DATA, FULL = "reference", "full_precision"
_AGAINST = {DATA: "reference", FULL: "full precision"}

SAME_SEEDS = "Same seeds: the sets are dependent, which lowers the value; an unchanged model is at 0."
PAIRED = "Image i of both from seed i; 8-bit images, all pixels together."
GBOPS = (
    "MACs x weight bits x activation bits of one image, all steps. Layers in full precision and attention products "
    "count 32 x 32. Bit-operations are not speed."
)
STATE = "Input and output states at the end of the trajectory, measured; per image."
SECONDS = "Wall time of the denoising of all images. Simulated integers are not faster."


class Measurement(TypedDict):
    """A figure. name: for programs, the same for every extractor. label: for people; FID only with Inception.

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


def measurement(name: str, label: str, extractor: str | None, value: float | None, n: int,
                interval: Mapping[str, Any] | None, *notes: str | None) -> Measurement:  # fmt: skip
    """A row of plain values: what is not finite becomes None, and the notes one text."""
    ends = (None, None) if interval is None else (interval["low"], interval["high"])
    value, low, high = (None if x is None or not math.isfinite(x) else float(x) for x in (value, *ends))
    return {"name": name, "label": label, "extractor": extractor, "value": value, "n": n, "low": low, "high": high,
            "note": " ".join(note for note in notes if note)}  # fmt: skip


@dataclass(frozen=True)
class ImageSet:
    """All images of a configuration, or a set of real ones, as the metrics need them. N images, D features.

    pooled: (N, D) float32. spatial: rows (N, D2) float32; of real images, which are neither shown nor resampled, their
    moments. images: uint8 (N, H, W, C); none of real ones.
    """

    pooled: Tensor
    spatial: Tensor | Moments | None = None
    probabilities: Tensor | None = None
    images: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))
    seconds: float = 0.0
    state_bytes_per_image: float = 0.0
    broken: int = 0
    gbops: float = 0.0

    def __len__(self) -> int:
        return len(self.pooled)


def gather(batches: Iterable[tuple[DrawnImages, Features]]) -> ImageSet:
    """One set from batches; it keeps their images and features."""
    drawn, features = zip(*batches, strict=True)
    return ImageSet(
        *joined(features),
        images=np.concatenate([batch.images for batch in drawn]),
        seconds=sum(batch.seconds for batch in drawn),
        state_bytes_per_image=max(batch.state_bytes / len(batch.images) for batch in drawn),
        broken=sum(batch.broken for batch in drawn),
        gbops=drawn[0].gbops,
    )


def gather_real(batches: Iterable[np.ndarray], extractor: FeatureExtractor) -> ImageSet:
    """The set of real images, uint8 (n, H, W, C) at a time; it keeps their pooled features alone."""
    spatial: Moments | None = None
    features: list[Features] = []
    for images in batches:
        rows = extractor(torch.tensor(images))
        if rows.spatial is not None:
            spatial = spatial or Moments(rows.spatial.shape[1])
            spatial.update(rows.spatial)
        features.append(rows._replace(spatial=None))
    return ImageSet(joined(features).pooled, spatial)


@dataclass(frozen=True)
class Judge:
    """What configurations are judged with: full precision, and real images if there are any."""

    extractor: FeatureExtractor
    full: ImageSet
    reference: ImageSet | None = None
    resamples: int = RESAMPLES

    def measure(self, images: ImageSet) -> list[Measurement]:
        """All figures of a configuration; those to full precision only if it is not full precision itself."""
        rows: list[Measurement] = [] if images is self.full else self._paired(images)
        if self.extractor.dimension:
            rows = [*(self._halves() if images is self.full else self._distances(images, self.full, FULL)), *rows]
        if self.reference is not None:
            rows += self._distances(images, self.reference, DATA)
        return mark_broken(images, [*rows, *self._score(images), *_costs(images)])

    def _row(self, metric: str, against: str | None, value: float | None, n: int,
             interval: Mapping[str, Any] | None, *notes: str | None) -> Measurement:  # fmt: skip
        label, name = result_name(metric, self.extractor), metric
        if against is not None:
            name, label = f"{metric}_to_{against}", f"{label} to {_AGAINST[against]}"
        if name == "fd_to_full_precision":
            label = result_name(name, self.extractor)
        return measurement(name, label, self.extractor.name, value, n, interval, *notes, self.extractor.note)

    def _distances(self, images: ImageSet, other: ImageSet, against: str) -> list[Measurement]:
        to_full = against == FULL
        rows = [self._frechet("fd", images.pooled, other.pooled if to_full else Moments.of(other.pooled), against)]
        if isinstance(images.spatial, Tensor) and other.spatial is not None:
            rows.append(self._frechet("spatial_fd", images.spatial, other.spatial, against))
        return [*rows, self._kernel(images, other, against), *self._manifolds(images, other, against)]

    def _frechet(self, metric: str, rows: Tensor, other: Tensor | Moments, against: str) -> Measurement:
        paired = isinstance(other, Tensor)
        count = len(other) if paired else other.count
        how = SAME_SEEDS if paired else f"To {count} images of the reference data, which are not resampled."
        distance, notes = self._interval(rows, other, "paired" if paired else "independent", min(len(rows), count))
        return self._row(metric, against, distance["estimate"], len(rows), distance, how, *notes)

    def _interval(
        self, rows: Tensor, other: Tensor | Moments, draw: Draw, count: int
    ) -> tuple[Interval, list[str | None]]:
        dimension, resamples = rows.shape[1], self.resamples
        kind, effort = "centred", None
        if dimension > LARGEST_RESAMPLED:
            kind, resamples = "normal", min(self.resamples, FEW_RESAMPLES)
            effort = f"Interval: 1.96 standard deviations over {resamples} resamples, as one takes long."
        interval = frechet_interval(rows, other, resamples=resamples, kind=kind, draw=draw)
        return interval, [small_sample_note("frechet_distance", count, dimension), effort]

    def _kernel(self, images: ImageSet, other: ImageSet, against: str) -> Measurement:
        smaller = min(len(images), len(other))
        size = min(SUBSET_SIZE, smaller // 2)
        distance, deviation = kernel_distance(images.pooled, other.pooled, subsets=SUBSETS, subset_size=size)
        # Subsets of m out of n without replacement: Var(n) = Var(m) m / (n - m), the delete-d jackknife.
        spread = 1.96 * deviation * math.sqrt(size / (smaller - size))
        note = f"{SUBSETS} subsets of {size}; interval by the delete-d jackknife, as for independent sets."
        ends = {"low": distance - spread, "high": distance + spread}
        return self._row("kernel_distance", against, distance, len(images), ends, note)

    def _manifolds(self, images: ImageSet, other: ImageSet, against: str) -> list[Measurement]:
        real, made = other.pooled[:MANIFOLD], images.pooled[:MANIFOLD]
        small = small_sample_note("precision_recall", min(len(real), len(made)))
        rows: list[Measurement] = []
        for metric, queries, manifold in (("precision", made, real), ("recall", real, made)):
            inside = within_manifold(queries, manifold, neighbours=NEIGHBOURS).double()
            share = bootstrap(torch.mean, [inside], resamples=self.resamples)
            note = f"{NEIGHBOURS} neighbours; {len(queries)} images in the manifold of {len(manifold)}."
            rows.append(self._row(metric, against, share["estimate"], len(made), share, note, small))
        return rows

    def _score(self, images: ImageSet) -> list[Measurement]:
        if images.probabilities is None:
            return []
        score = bootstrap(inception_score, [images.probabilities.double()], resamples=self.resamples, kind="centred")
        small = small_sample_note("inception_score", len(images), images.probabilities.shape[1])
        return [self._row("score", None, score["estimate"], len(images), score, "One split.", small)]

    def _halves(self) -> list[Measurement]:
        """How far two sets of full precision are apart, each of half the images."""
        half = len(self.full) // 2
        first, second = self.full.pooled[:half], self.full.pooled[half : 2 * half]
        distance, notes = self._interval(first, second, "independent", half)
        how = f"Two halves of {half} images of full precision, other seeds: what sampling alone makes at this n."
        row = self._row("fd", None, distance["estimate"], half, distance, how, *notes)
        return [{**row, "name": "fd_between_halves", "label": f"{row['label']} between halves"}]

    def _paired(self, images: ImageSet) -> list[Measurement]:
        errors = paired_errors(images.images, self.full.images, resamples=self.resamples)
        rows: list[Measurement] = []
        for name, label in (("relative_l2", "relative L2"), ("psnr_db", "PSNR dB"), ("ssim", "SSIM")):
            interval = errors[name]
            if interval is None:
                note = f"The images are smaller than its window of {WINDOW} pixels."
                rows.append(measurement(name, label, None, None, errors["n"], None, note))
                continue
            equal = name == "psnr_db" and interval["estimate"] is None
            infinite = "Infinite: all images are equal to full precision." if equal else None
            rows.append(measurement(name, label, None, interval["estimate"], errors["n"], interval,
                                    infinite, PAIRED, errors["note"]))  # fmt: skip
        return rows


def _costs(images: ImageSet) -> list[Measurement]:
    return [
        measurement("gbops", "GBOPs", None, images.gbops, 1, None, GBOPS),
        measurement("state_mib", "state MiB", None, images.state_bytes_per_image / 2**20, len(images), None, STATE),
        measurement("seconds", "seconds", None, images.seconds, len(images), None, SECONDS),
    ]


def mark_broken(images: ImageSet, rows: list[Measurement]) -> list[Measurement]:
    """The rows of a configuration, with a warning in each if some images were not finite."""
    if not images.broken:
        return rows
    warning = f"{images.broken} of {len(images)} images were not finite and count as black."
    return [{**row, "note": f"{warning} {row['note']}".strip()} for row in rows]
