"""A modulated network's steps as one CUDA graph: launched once a step, with all states where they were recorded.

The first steps of a trajectory run as they are: states start, moves appear, kernels compile. The next one is recorded,
and from then on repeated, in later trajectories too, whose states take the same places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from modiff.model.trajectory import model_trajectory
from modiff.nn.buffers import Buffers
from recordable import STEPS_BEFORE


class Graph(Protocol):
    """What was recorded."""

    def replay(self) -> None:
        """Repeat it."""


Record = Callable[[Callable[[], Tensor]], tuple[Graph, Tensor]]
"""Records a function without running it: (graph, the tensor that every replay writes its result into)."""


def on_gpu(function: Callable[[], Tensor]) -> tuple[Graph, Tensor]:
    """A CUDA graph of the function."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function()
    return graph, output


class Recorded:
    """A network of (x, t) whose steps are recorded: call it inside `begin()`, as often as the trajectory has steps.

    network: carries modiff, and has no `recording_unsupported`. call: how it is evaluated, compiled or not.
    """

    def __init__(self, network: nn.Module, call: Callable[[Tensor, Tensor], Tensor], record: Record = on_gpu) -> None:
        self.network, self.call, self.record = network, call, record
        self.buffers = Buffers()
        self.graph: Graph | None = None
        self.given: tuple[Tensor, Tensor] | None = None
        self.output: Tensor | None = None
        self.version, self.step = -1, 0

    @contextmanager
    def begin(self) -> Iterator[None]:
        """One trajectory."""
        self.step = 0
        with model_trajectory(self.network, self.buffers):
            yield

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The next step's result, a tensor of its own."""
        self.step += 1
        x, t = self._copied(x, t)
        if self.step <= STEPS_BEFORE:
            return self.call(x, t).clone()
        if self.graph is None or self.output is None or self.version != self.buffers.version:
            self.graph, self.output = self.record(lambda: self.call(x, t))
            self.version = self.buffers.version
        self.graph.replay()
        return self.output.clone()

    def _copied(self, *values: Any) -> tuple[Tensor, ...]:
        """The inputs, where the graph reads them. New shapes void the graph."""
        held = self.given
        if held is None or any(h.shape != v.shape or h.dtype != v.dtype for h, v in zip(held, values, strict=True)):
            self.given = held = tuple(torch.empty_like(v) for v in values)
            self.graph = None
        for place, value in zip(held, values, strict=True):
            place.copy_(value)
        return held
