"""An engine without a model: the image of index i is noise from seed + i, and every span it draws is noted.

As a script, `python -m tests.generate.fakes MODEL FOLDER MARKER`: a job on the real Ray whose first worker dies.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modiff.generate import worker
from modiff.generate.job import Job
from modiff.generate.on_ray import RayEngine
from modiff.generate.run import Generated, run_job
from modiff.generate.shards import Span
from modiff.generate.worker import Description, DrawnSpan, draw_span

SHAPE = (4, 5, 3)


def image(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, SHAPE, dtype=np.uint8)


def fake_job(num_images: int = 11, **changes: Any) -> Job:
    return Job(**{"model": "fake", "num_images": num_images, "batch_size": 2, "shard_size": 4} | changes)


class FakeEngine:
    """`digest`: of the model that it says it has."""

    def __init__(self, digest: str = "model") -> None:
        self.digest, self.drawn = digest, list[Span]()

    def describe(self, job: Job) -> Description:
        return {"model": self.digest, "pipeline": "Fake", "scheduler": {"kind": str(job.scheduler)}}, SHAPE

    def draw(
        self, job: Job, batch_size: int, spans: Sequence[Span], tick: Callable[[int], object]
    ) -> Iterator[DrawnSpan]:
        for span in spans:
            self.drawn.append(span)
            images = np.stack([image(job.seed + i) for i in range(span.first, span.first + span.count)])
            tick(span.count)
            yield DrawnSpan(span.first, images, self.digest, {"threads": 1})

    def close(self) -> None:
        pass


def run(folder: Path, num_images: int = 11, engine: FakeEngine | None = None, **changes: Any) -> Generated:
    """A fake job into a folder."""
    return run_job(fake_job(num_images, **changes), folder, engine=engine or FakeEngine())


def extended(folder: Path) -> None:
    """A folder of three images, then of seven."""
    run(folder, 3)
    run(folder, 7)


def dying(marker: str) -> Callable[[Job, int, Span], DrawnSpan]:
    """draw_span in a worker that dies at the second shard, once; the marker says that it did."""

    def draw(job: Job, batch_size: int, span: Span) -> DrawnSpan:
        if span.first == batch_size and not os.path.exists(marker):  # noqa: PTH110
            with open(marker, "w"):  # noqa: PTH123
                os._exit(1)
        return draw_span(job, batch_size, span)

    return draw


if __name__ == "__main__":
    job = Job(model=sys.argv[1], num_images=100_000, steps=2, batch_size=2, shard_size=2)
    worker.draw_span = dying(sys.argv[3])
    run_job(job, Path(sys.argv[2]), engine=RayEngine(workers=1))
