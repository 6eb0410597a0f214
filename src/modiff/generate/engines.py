"""Where the spans of a job are drawn: what `run` asks of an engine, and the engine that is this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Protocol, Self

import torch

from modiff.generate import worker
from modiff.generate.job import Job
from modiff.generate.shards import Span
from modiff.generate.worker import Description, Drawn


class Engine(Protocol):
    """Draws spans, in any order, on whatever machines it has. It is entered before it is used, and left at the end."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def describe(self, job: Job) -> Description:
        """As `worker.describe`."""
        ...

    def draw(self, job: Job, batch_size: int, spans: Sequence[Span], tick: Callable[[int], object]) -> Iterator[Drawn]:
        """As `worker.draw_span` for each span, as they are done; `tick` hears of the images."""
        ...


class LocalEngine:
    """This process, one span after the other."""

    def __enter__(self) -> Self:
        self._threads = torch.get_num_threads()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.set_num_threads(self._threads)
        worker.close()

    def describe(self, job: Job) -> Description:
        """Open the model and see what it makes."""
        return worker.describe(job)

    def draw(self, job: Job, batch_size: int, spans: Sequence[Span], tick: Callable[[int], object]) -> Iterator[Drawn]:
        """The spans in their order; `tick` hears of each batch."""
        for span in spans:
            yield worker.draw_span(job, batch_size, span, tick)
