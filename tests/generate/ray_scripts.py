"""A job on the real Ray whose first worker dies: `python -m tests.generate.ray_scripts MODEL FOLDER MARKER`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from modiff.generate import worker
from modiff.generate.job import Job
from modiff.generate.on_ray import RayEngine
from modiff.generate.run import run_job
from modiff.generate.shards import Span
from modiff.generate.worker import DrawnSpan, draw_span


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
