"""What the suite has drawn, on disk: batches of images with their features."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from modiff.evaluate.features.extractor import Features
from modiff.evaluate.pipelines import DrawnImages
from modiff.evaluate.suite.plans import Plan
from modiff.files import read_tensors, reading, write_tensors


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
