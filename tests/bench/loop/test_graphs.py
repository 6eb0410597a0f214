"""Recorded steps of the loop benchmark: which steps run, are recorded and are repeated; what voids a recording."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import modiff
from loop import graphs as loop_graphs
from loop import variants as loop_variants
from loop.graphs import Recorded
from loop.models import HIDDEN
from loop.variants import CannotRun, Task
from modiff import ModiffConfig, presets
from modiff.kernels import kernel, native
from modiff.kernels.dispatch import Choice
from modiff.model.attach import Attachment
from tests.bench.loop.recorder import Recorder
from tests.helpers import assert_same_bits
from tests.model.toys import SHAPE, toy


class Undone:
    """A recording of tests/bench/recorder.py, which has to run what it records: what that wrote is undone."""

    def __init__(self, recorder: Recorder, before: list[tuple[Tensor, Tensor]]) -> None:
        self.recorder = recorder
        for tensor, copy in before:
            tensor.copy_(copy)

    def replay(self) -> None:
        self.recorder.replay()


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> tuple[Recorded, list[str], Any]:
    """A modulated toy; the log has a word for each evaluation by Python and each recording."""
    monkeypatch.setattr(Attachment, "_count_visits", lambda _: None)  # as on GPUs: it would wait for the device
    monkeypatch.setattr(native, "load", lambda *_: native.Native(None, "switched off"))
    monkeypatch.setattr(kernel, "plan", lambda *_: Choice("reference", "a test"))
    model, log = toy(), []
    modiff.apply(model, presets.w8a4().on_integers())

    def call(x: Tensor, t: Tensor) -> Tensor:
        log.append("evaluated")
        return model(x, t)

    def record(function: Callable[[], Tensor]) -> tuple[Undone, Tensor]:
        log.append("recorded")
        before = [(tensor, tensor.clone()) for tensor in found.kept.tensors]
        with (recorder := Recorder()):
            output = function()
        return Undone(recorder, before), output

    found = Recorded(model, call, record)
    return found, log, model


def inputs(seed: int, steps: int, batch: int = SHAPE[0]) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    drift = torch.stack([0.3 * torch.randn((batch, *SHAPE[1:]), generator=generator) for _ in range(steps)]).cumsum(0)
    return [(x, torch.full((batch,), 1000.0 - 30 * i)) for i, x in enumerate(drift)]


def run(recorded: Recorded, steps: list[tuple[Tensor, Tensor]]) -> Tensor:
    with torch.no_grad(), recorded.begin():
        return torch.stack([recorded(x, t) for x, t in steps])


def expected(model: Any, steps: list[tuple[Tensor, Tensor]]) -> Tensor:
    with torch.no_grad(), modiff.trajectory(model):
        return torch.stack([model(x, t) for x, t in steps])


def test_steps_are_recorded_once_and_repeated_in_every_trajectory(recorded: Any) -> None:
    loop, log, model = recorded
    for seed in (0, 1):
        assert_same_bits(run(loop, inputs(seed, 6)), expected(model, inputs(seed, 6)))
    assert log == ["evaluated"] * 3 + ["recorded", "evaluated"] + ["evaluated"] * 3
    assert loop.kept.bytes_held() > 0


def test_another_batch_is_recorded_anew(recorded: Any) -> None:
    loop, log, model = recorded
    for batch in (2, 1, 2):
        assert_same_bits(run(loop, inputs(0, 5, batch)), expected(model, inputs(0, 5, batch)))
    assert log.count("recorded") == 3


def test_a_trajectory_too_short_for_a_recording_runs_as_it_is(recorded: Any) -> None:
    loop, log, model = recorded
    assert_same_bits(run(loop, inputs(0, 2)), expected(model, inputs(0, 2)))
    assert log == ["evaluated"] * 2


def test_a_result_is_not_overwritten_by_the_next_step(recorded: Any) -> None:
    loop, _, _ = recorded
    with torch.no_grad(), loop.begin():
        results = [loop(x, t) for x, t in inputs(0, 6)]
        kept = [result.clone() for result in results[:-1]]
    assert all(torch.equal(a, b) for a, b in zip(results, kept, strict=False))
    assert len({result.data_ptr() for result in results}) == 6


def test_on_a_gpu_torch_records(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Context:
        def __init__(self, graph: Any) -> None:
            seen.append(graph)

        def __enter__(self) -> None:
            seen.append("began")

        def __exit__(self, *_: object) -> None:
            seen.append("ended")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "graph")
    monkeypatch.setattr(torch.cuda, "graph", Context)
    graph, output = loop_graphs.on_gpu(lambda: torch.ones(len(seen)))
    assert (graph, seen) == ("graph", ["graph", "began", "ended"])
    assert output.shape == (2,)


def test_on_gpus_a_modulated_variant_is_recorded_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_variants, "compiler", lambda *_: lambda net, **_words: net)

    def parts(config: ModiffConfig) -> Any:
        found = loop_variants.parts_of(Task(HIDDEN["tiny"], "modulated-w8a8", timed=2))
        found.loop.device = torch.device("cuda")  # what follows looks at it, and computes nothing
        modiff.apply(found.net, config)
        return found

    ready = loop_variants.modulated(parts(presets.w8a8().on_integers()))
    assert isinstance(ready.step, Recorded)
    assert ready.state() == 0
    with pytest.raises(CannotRun, match=r"no CUDA graph can hold a step: .*it is simulated"):
        loop_variants.modulated(parts(presets.w8a8()))


@pytest.mark.gpu
@torch.no_grad()
def test_a_cuda_graph_gives_the_steps_that_python_gives() -> None:
    net: Any = HIDDEN["tiny"].build(torch.device("cuda"))[0]
    modiff.apply(net, presets.w8a8().on_integers())
    loop = Recorded(net, lambda x, t: net(x, t, return_dict=False)[0])
    generator = torch.Generator().manual_seed(0)
    times = torch.arange(900, 0, -100)
    for _ in range(2):
        xs = (0.3 * torch.randn(9, 2, 1, 8, 8, generator=generator)).cumsum(0)
        steps = [(x.cuda(), t.expand(2).cuda()) for x, t in zip(xs, times, strict=True)]
        with modiff.trajectory(net):
            wanted = torch.stack([net(x, t, return_dict=False)[0] for x, t in steps])
        with loop.begin():
            found = torch.stack([loop(x, t) for x, t in steps])
        assert_same_bits(found, wanted)
    assert loop.graph is not None
