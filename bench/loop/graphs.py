"""A modulated network's steps as one CUDA graph: launched once a step, with all states where they were recorded.

The first steps of a trajectory run as they are: states start, moves appear, kernels compile. The next one is recorded,
and from then on repeated, in later trajectories too, whose states take the same places.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from loop.recordable import STEPS_BEFORE
from modiff.model.attach import required_attachment
from modiff.model.trajectory import model_trajectory


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


class KeptStates:
    """The tensors that the states had when a step was recorded: those of later trajectories are moved into them.

    version: grows whenever the states have other shapes, so that what was recorded with the old ones is void.
    """

    def __init__(self, network: nn.Module) -> None:
        self.attachment = required_attachment(network, "KeptStates")
        self.tensors: list[Tensor] = []
        self.version = 0

    def take(self) -> None:
        """Give the present states, once a step has made them all, the memory that is kept."""
        present = {id(t): t for layer in self.attachment.layers.values() for t in layer.loop.tensors()}
        present |= {id(c.times): c.times for c in self.attachment.clock._contexts.values() if c.times is not None}
        states = list(present.values())
        if len(states) != len(self.tensors) or not all(map(_alike, states, self.tensors)):
            self.tensors, self.version = [state.detach() for state in states], self.version + 1
            return
        for state, kept in zip(states, self.tensors, strict=True):
            kept.copy_(state)
            state.data = kept

    def bytes_held(self) -> int:
        """Of all tensors kept, in a trajectory or between two."""
        return sum(storage.nbytes() for storage in {t.untyped_storage() for t in self.tensors})


def _alike(x: Tensor, y: Tensor) -> bool:
    """Whether x fits into the memory of y, and may be written there."""
    kinds = [(t.shape, t.stride(), t.dtype, t.device, t.is_inference()) for t in (x, y)]
    return kinds[0] == kinds[1]


class Recorded:
    """A network of (x, t) whose steps are recorded: call it inside `begin()`, as often as the trajectory has steps.

    network: carries modiff, and has no `recording_unsupported`. call: how it is evaluated, compiled or not.
    """

    def __init__(self, network: nn.Module, call: Callable[[Tensor, Tensor], Tensor], record: Record = on_gpu) -> None:
        self.network, self.call, self.record = network, call, record
        self.kept = KeptStates(network)
        self.graph: Graph | None = None
        self.inputs: tuple[Tensor, Tensor] | None = None
        self.output: Tensor | None = None
        self.version, self.step = -1, 0

    @contextmanager
    def begin(self) -> Iterator[None]:
        """One trajectory."""
        self.step = 0
        with model_trajectory(self.network):
            yield

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The next step's result, a tensor of its own."""
        self.step += 1
        x, t = self._copied(x, t)
        if self.step <= STEPS_BEFORE:
            return self.call(x, t).clone()
        if self.step == STEPS_BEFORE + 1:
            self.kept.take()
        if self.graph is None or self.output is None or self.version != self.kept.version:
            self.graph, self.output = self.record(lambda: self.call(x, t))
            self.version = self.kept.version
        self.graph.replay()
        return self.output.clone()

    def _copied(self, *values: Any) -> tuple[Tensor, ...]:
        """The inputs, where the graph reads them. New shapes void the graph."""
        held = self.inputs
        if held is None or any(h.shape != v.shape or h.dtype != v.dtype for h, v in zip(held, values, strict=True)):
            self.inputs = held = tuple(torch.empty_like(v) for v in values)
            self.graph = None
        for place, value in zip(held, values, strict=True):
            place.copy_(value)
        return held
