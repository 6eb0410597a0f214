"""An engine without a model: the image of index i is noise from seed + i, and every span it draws is noted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modiff.files import LOCK
from modiff.generate.job import Job
from modiff.generate.run import Generated, run_job
from modiff.generate.shards import Span
from modiff.generate.worker import Description, DrawnSpan

SHAPE = (4, 5, 3)


def image(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, SHAPE, dtype=np.uint8)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != LOCK}


def fake_job(num_images: int = 11, **changes: Any) -> Job:
    return Job(**{"model": "fake", "num_images": num_images, "batch_size": 2, "shard_size": 4} | changes)


class FakeEngine:
    """`stop_at`: raises KeyboardInterrupt instead of the span with that number. `log`: a file of the spans drawn."""

    def __init__(
        self, *, stop_at: int | None = None, log: Path | None = None, digest: str = "model", threads: int = 1
    ) -> None:
        self.stop_at, self.log, self.digest, self.environment = stop_at, log, digest, {"threads": threads}
        self.drawn: list[Span] = []

    def describe(self, job: Job) -> Description:
        return {"model": self.digest, "pipeline": "Fake", "scheduler": {"kind": str(job.scheduler)}}, SHAPE

    def draw(
        self, job: Job, batch_size: int, spans: Sequence[Span], tick: Callable[[int], object]
    ) -> Iterator[DrawnSpan]:
        for span in spans:
            if len(self.drawn) == self.stop_at:
                raise KeyboardInterrupt
            self.drawn.append(span)
            if self.log is not None:
                with self.log.open("a") as file:
                    file.write(f"{span.first} {span.count}\n")
            images = np.stack([image(job.seed + i) for i in range(span.first, span.first + span.count)])
            tick(span.count)
            yield DrawnSpan(span.first, images, self.digest, self.environment)

    def close(self) -> None:
        pass


def run(folder: Path, num_images: int = 11, engine: FakeEngine | None = None, **changes: Any) -> Generated:
    """A fake job into a folder."""
    return run_job(fake_job(num_images, **changes), folder, engine=engine or FakeEngine())
