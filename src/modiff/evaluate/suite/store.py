"""What the suite has finished, on disk: batches of images with their features, and computed rows."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from modiff.errors import FormatError
from modiff.evaluate.suite.plans import Plan
from modiff.files import check_writable, write_atomically, write_json

PLAN, ROW = "plan.json", "row.json"


class SavedBatch(NamedTuple):
    """Images of consecutive sample indices: uint8 (N, H, W, C), and what the extractor and the clock said of them."""

    images: np.ndarray
    pooled: np.ndarray
    spatial: np.ndarray | None
    probabilities: np.ndarray | None
    seconds: float
    state_bytes: int
    broken: int


class Store:
    """A folder for each plan in the folder of one job, with its batches and its row.

    A batch file holds `batch_size` images, the last one of a run what is left, and counts only if it is exactly that
    long: scales that a batch shares depend on what is in it. So a run with more images keeps all full batches.
    """

    def __init__(self, folder: Path, batch_size: int) -> None:
        self.folder, self.batch_size = folder, batch_size

    def missing(self, plan: Plan, num_images: int) -> list[range]:
        """The batches that are still to be drawn, as ranges of sample indices."""
        return [indices for indices in self._batches(num_images) if not self._path(plan, indices).is_file()]

    def save(self, plan: Plan, indices: range, batch: SavedBatch) -> None:
        """Write a batch; it is there whole or not at all."""
        path = self._path(plan, indices)
        arrays = {name: value for name, value in batch._asdict().items() if value is not None}
        check_writable(path)
        write_atomically(path, lambda file: np.savez(file, **arrays))

    def load(self, plan: Plan, num_images: int) -> Iterator[SavedBatch]:
        """All batches in order of the sample index. Raises: FormatError for a file that is damaged."""
        for indices in self._batches(num_images):
            yield _read(self._path(plan, indices), len(indices))

    def gbops(self, plan: Plan) -> float | None:
        """What `save_gbops` wrote; None if nothing can be read, and it is counted again."""
        try:
            return float(self._json(plan, PLAN)["gbops"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def save_gbops(self, plan: Plan, gbops: float) -> None:
        """Write the bit-operations of one image of a plan, and what the plan is."""
        config = None if plan.config is None else plan.config.to_dict()
        self._save_json(plan, PLAN, {"name": plan.name, "steps": plan.steps, "gbops": gbops, "config": config})

    def row(self, plan: Plan, depends_on: dict[str, Any]) -> dict[str, Any] | None:
        """A row computed before from the same things; None if there is none, and it is computed from the batches."""
        try:
            past = self._json(plan, ROW)
            return past["row"] if past["depends_on"] == json.loads(json.dumps(depends_on)) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def save_row(self, plan: Plan, depends_on: dict[str, Any], row: dict[str, Any]) -> None:
        """Write a row, with what it was computed from."""
        self._save_json(plan, ROW, {"depends_on": depends_on, "row": row})

    def _json(self, plan: Plan, name: str) -> Any:
        return json.loads((self.folder / plan.key / name).read_text(encoding="utf-8"))

    def _save_json(self, plan: Plan, name: str, value: dict[str, Any]) -> None:
        path = self.folder / plan.key / name
        check_writable(path)
        write_json(path, value)

    def _batches(self, num_images: int) -> list[range]:
        return [range(i, min(i + self.batch_size, num_images)) for i in range(0, num_images, self.batch_size)]

    def _path(self, plan: Plan, indices: range) -> Path:
        return self.folder / plan.key / f"{indices.start:06d}-{indices.stop:06d}.npz"


def _read(path: Path, count: int) -> SavedBatch:
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        batch = SavedBatch(
            images=arrays["images"], pooled=arrays["pooled"], spatial=arrays.get("spatial"),
            probabilities=arrays.get("probabilities"), seconds=float(arrays["seconds"]),
            state_bytes=int(arrays["state_bytes"]), broken=int(arrays["broken"]),
        )  # fmt: skip
        if len(batch.images) != count or len(batch.pooled) != count:
            raise ValueError(f"{len(batch.images)} images with features of {len(batch.pooled)}")
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise FormatError(
            f"{path}: expected a batch of {count} images, got {type(error).__name__}: {error}. The file is damaged. "
            "Delete it: the next run draws it again."
        ) from error
    return batch
