"""What the evaluation suite has finished, on disk: batches of images with their features, and computed rows."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from modiff.errors import ConfigError, FormatError
from modiff.evaluate.suite_plans import Plan
from modiff.files import check_writable, write_atomically, write_json

FORMAT_VERSION = 1
SETTINGS, PLAN, ROW = "settings.json", "plan.json", "row.json"


class Batch(NamedTuple):
    """Images of consecutive sample indices: uint8 (N, H, W, C), and what the extractor and the clock said of them."""

    images: np.ndarray
    pooled: np.ndarray
    spatial: np.ndarray | None
    probabilities: np.ndarray | None
    seconds: float
    state_bytes: int
    broken: int


class Store:
    """A folder that belongs to one job: settings.json, and a folder for each plan with its batches.

    A batch file holds `batch_size` images, the last one of a run what is left, and counts only if it is exactly that
    long: scales that a batch shares depend on what is in it. So a run with more images keeps all full batches.

    Args:
        settings: all that shapes images and features beside the plans, as plain JSON values; batch_size among them.
    Raises: ConfigError if the folder holds a job with other settings, or other files; OSError that names a file.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.settings = json.loads(json.dumps({"format_version": FORMAT_VERSION} | settings))
        self.batch_size: int = self.settings["batch_size"]
        self._claim()

    def missing(self, plan: Plan, num_images: int) -> list[range]:
        """The batches that are still to be drawn, as ranges of sample indices."""
        wanted = self._batches(num_images)
        return [indices for indices in wanted if not self._path(plan, indices).is_file()]

    def save(self, plan: Plan, indices: range, batch: Batch) -> None:
        """Keep a batch; it is there whole or not at all."""
        path = self._path(plan, indices)
        arrays = {name: value for name, value in batch._asdict().items() if value is not None}
        check_writable(path)
        write_atomically(path, lambda file: np.savez(file, **arrays))

    def load(self, plan: Plan, num_images: int) -> Iterator[Batch]:
        """All batches in order of the sample index.

        Raises: FormatError for a file that is damaged.
        """
        for indices in self._batches(num_images):
            yield _read(self._path(plan, indices), len(indices))

    def gbops(self, plan: Plan) -> float | None:
        """What `save_gbops` kept; None if nothing."""
        try:
            return float(json.loads((self.folder / plan.key / PLAN).read_text(encoding="utf-8"))["gbops"])
        except (OSError, ValueError, KeyError, TypeError):
            return None  # it is counted again

    def save_gbops(self, plan: Plan, gbops: float) -> None:
        """Keep the bit-operations of one image of a plan, and what the plan is."""
        path = self.folder / plan.key / PLAN
        check_writable(path)
        config = None if plan.config is None else plan.config.to_dict()
        write_json(path, {"name": plan.name, "steps": plan.steps, "gbops": gbops, "config": config})

    def row(self, plan: Plan, depends_on: dict[str, Any]) -> dict[str, Any] | None:
        """A row computed before, if it was from the same things; None if not."""
        try:
            kept = json.loads((self.folder / plan.key / ROW).read_text(encoding="utf-8"))
            return kept["row"] if kept["depends_on"] == json.loads(json.dumps(depends_on)) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None  # it is computed again from the batches

    def save_row(self, plan: Plan, depends_on: dict[str, Any], row: dict[str, Any]) -> None:
        """Keep a row, with what it was computed from."""
        path = self.folder / plan.key / ROW
        check_writable(path)
        write_json(path, {"depends_on": depends_on, "row": row})

    def _batches(self, num_images: int) -> list[range]:
        return [range(i, min(i + self.batch_size, num_images)) for i in range(0, num_images, self.batch_size)]

    def _path(self, plan: Plan, indices: range) -> Path:
        return self.folder / plan.key / f"{indices.start:06d}-{indices.stop:06d}.npz"

    def _claim(self) -> None:
        record = self.folder / SETTINGS
        check_writable(record)
        if not record.is_file():
            foreign = sorted(p.name for p in self.folder.iterdir())
            if foreign:
                raise ConfigError(
                    f"{self.folder}: expected an empty folder or one of an earlier run, got {foreign[0]} and no "
                    f"{SETTINGS}. Its files are not to be mixed with others. Give another folder."
                )
            write_json(record, self.settings)
            return
        try:
            past = dict(json.loads(record.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise FormatError(
                f"{record}: expected the settings of an earlier run, got {error}. Nothing can be added to it. Give "
                "another folder."
            ) from error
        differing = sorted(key for key in {*past, *self.settings} if past.get(key) != self.settings.get(key))
        if differing:
            raise ConfigError(
                f"{self.folder}: expected a folder with the same settings, got another {' and '.join(differing)}. Its "
                "images do not belong to this job. Give another folder with -o, or the settings that it began with."
            )


def _read(path: Path, count: int) -> Batch:
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
        batch = Batch(
            images=found["images"], pooled=found["pooled"], spatial=found.get("spatial"),
            probabilities=found.get("probabilities"), seconds=float(found["seconds"]),
            state_bytes=int(found["state_bytes"]), broken=int(found["broken"]),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise FormatError(
            f"{path}: expected a batch of images, got {type(error).__name__}: {error}. The file is damaged. Delete it: "
            "the next run draws it again."
        ) from error
    if len(batch.images) != count or len(batch.pooled) != count:
        raise FormatError(
            f"{path}: expected {count} images, got {len(batch.images)} and features of {len(batch.pooled)}. The file "
            "is not what its name says. Delete it: the next run draws it again."
        )
    return batch
