"""An engine without a model: the image of index i is noise from seed + i, and every span it draws is noted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from modiff.generate.job import Job
from modiff.generate.shards import Span
from modiff.generate.worker import Description, DrawnSpan

SHAPE = (4, 5, 3)
ENVIRONMENT = {"threads": 1}


def image(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, SHAPE, dtype=np.uint8)


class FakeEngine:
    """`stop_at`: raises KeyboardInterrupt instead of the span with that number. `log`: a file of the spans drawn."""

    def __init__(self, *, stop_at: int | None = None, log: Path | None = None, digest: str = "model") -> None:
        self.stop_at, self.log, self.digest = stop_at, log, digest
        self.environment = dict(ENVIRONMENT)
        self.drawn: list[Span] = []
        self.backwards = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def describe(self, job: Job) -> Description:
        return Description(digest="model", pipeline="Fake", scheduler={"kind": str(job.scheduler)}, shape=SHAPE)

    def draw(
        self, job: Job, batch_size: int, spans: Sequence[Span], tick: Callable[[int], object]
    ) -> Iterator[DrawnSpan]:
        for span in reversed(spans) if self.backwards else spans:
            if len(self.drawn) == self.stop_at:
                raise KeyboardInterrupt
            self.drawn.append(span)
            if self.log is not None:
                with self.log.open("a") as file:
                    file.write(f"{span.first} {span.count}\n")
            images = np.stack([image(job.seed + i) for i in range(span.first, span.first + span.count)])
            tick(span.count)
            yield DrawnSpan(first=span.first, images=images, digest=self.digest, environment=self.environment)
