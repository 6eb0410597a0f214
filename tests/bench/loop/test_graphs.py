"""Steps that may be recorded repeat bit for bit, in this trajectory and the next; others are refused for cause."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import modiff
from loop.graphs import KeptStates, Recorded
from loop.models import HIDDEN
from loop.recordable import recording_unsupported
from modiff import LayerConfig, ModiffConfig, ModulationConfig, QuantizerConfig, presets
from modiff.kernels import kernel, native
from modiff.kernels.dispatch import Choice
from modiff.model.trajectory import state_bytes
from modiff.nn.clock import Clock
from tests.helpers import assert_same_bits
from tests.model.toys import SHAPE, Toy, toy

Steps = list[tuple[Tensor, Tensor]]


class Waits(Exception):
    """An operator that waits for the device: a capture fails there."""


class Recorder(TorchDispatchMode):
    """A CUDA graph on the CPU: the operators of one run, repeated on the same tensors without Python."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            raise Waits(str(func))
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        """Every operator again: what it reads and where it writes lies where it lay."""
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture(autouse=True)
def _as_on_a_gpu(request, monkeypatch):
    """Only kernels that torch dispatches, and no look at timesteps that happen to lie on the host."""
    if request.node.get_closest_marker("gpu"):
        return
    monkeypatch.setattr(native, "load_library", lambda *_: native.Native(None, "switched off"))
    monkeypatch.setattr(kernel, "plan", lambda *_: Choice("reference", "a test"))
    monkeypatch.setattr(Clock, "_enter_branch", lambda *_: None)
    monkeypatch.setattr(Tensor, "is_cpu", False, raising=False)


def built(config: ModiffConfig) -> Toy:
    model = toy()
    modiff.apply(model, config)
    if not config.layer.activation.dynamic:
        modiff.calibrate(model, lambda: expected(model, inputs(9)))
    return model


def recorded(model: nn.Module) -> tuple[Recorded, list[str]]:
    """(a loop that records on the CPU, a log with a word for each evaluation by Python and each recording)."""
    log: list[str] = []

    def call(x: Tensor, t: Tensor) -> Tensor:
        log.append("evaluated")
        return model(x, t)

    def record(function: Callable[[], Tensor]) -> tuple[Recorder, Tensor]:
        log.append("recorded")
        before = [(tensor, tensor.clone()) for tensor in loop.kept.tensors]
        with (recorder := Recorder()):
            output = function()
        for tensor, copy in before:  # a recording runs nothing
            tensor.copy_(copy)
        return recorder, output

    loop = Recorded(model, call, record)
    return loop, log


def inputs(seed: int, steps: int = 8, batch: int = SHAPE[0]) -> Steps:
    """A drifting x and falling timesteps at uneven distances."""
    generator = torch.Generator().manual_seed(seed)
    drift = torch.stack([0.3 * torch.randn((batch, *SHAPE[1:]), generator=generator) for _ in range(steps)]).cumsum(0)
    return [(x, torch.full((batch,), 1000.0 - 20 * i - 3 * i * i)) for i, x in enumerate(drift)]


def run(loop: Recorded, steps: Steps) -> Tensor:
    with torch.no_grad(), loop.begin():
        return torch.stack([loop(x, t) for x, t in steps])


def expected(model: Any, steps: Steps) -> Tensor:
    with torch.no_grad(), modiff.trajectory(model):
        return torch.stack([model(x, t) for x, t in steps])


def of(modulation: dict[str, Any] | None = None, **activation: Any) -> ModiffConfig:
    """4-bit residuals on integers, with these settings."""
    quantizer, loop = (
        QuantizerConfig(**{"bits": 4, **activation}),
        ModulationConfig(**{"state_dtype": "float32", **(modulation or {})}),
    )
    return ModiffConfig(layer=LayerConfig(activation=quantizer, modulation=loop, execution="integer"))


GOOD = {
    "as published": of(),
    "linear predictor": of({"predictor": "linear", "gain": 0.8}),
    "first step in codes": of({"first_step": "coded", "rounds": 2}),
    "float16 states": of({"state_dtype": "float16"}),
    "a scale for all": of(granularity="tensor"),
    "without memory": presets.plain(8, 4).on_integers(),
}
BAD = {
    "simulated": (presets.w8a4(), "body: it is simulated, and its states move to new tensors"),
    "int16 states": (of({"state_dtype": "int16"}), "body: int16 states ask at every step"),
    "held scales": (of(refresh_every=3), "body: its scales are measured at every 3th step"),
    "new anchors": (of({"reanchor_every": 5}), "body: its states start again at every 5th step"),
    "static scales": (of(dynamic=False), "body: its static scales are compared with the size of each step"),
    "scales per step": (of(dynamic=False, step_groups=2), "body: its scales are chosen by the time step"),
}


@pytest.mark.parametrize("config", GOOD.values(), ids=GOOD)
def test_a_recorded_step_is_repeated_bit_for_bit_in_this_trajectory_and_the_next(config):
    model = built(config)
    assert recording_unsupported(model) == ""
    loop, log = recorded(model)
    for seed in (0, 1):
        assert_same_bits(run(loop, inputs(seed)), expected(model, inputs(seed)))
    assert log == ["evaluated"] * 3 + ["recorded", "evaluated"] + ["evaluated"] * 3


@pytest.mark.parametrize(("config", "message"), BAD.values(), ids=BAD)
def test_what_is_refused_could_not_have_been_repeated(config, message):
    model = built(config)
    assert recording_unsupported(model).startswith(message)
    try:
        found = run(recorded(model)[0], inputs(0))
    except Waits:
        return
    assert not torch.equal(found, expected(model, inputs(0)))


def test_another_batch_is_recorded_again_and_a_short_trajectory_is_not_recorded():
    loop, log = recorded(model := built(GOOD["as published"]))
    for batch, steps, recordings in ((2, 2, 0), (2, 5, 1), (1, 5, 2), (2, 5, 3)):
        assert_same_bits(run(loop, inputs(0, steps, batch)), expected(model, inputs(0, steps, batch)))
        assert log.count("recorded") == recordings


def test_states_are_moved_to_where_they_were_recorded_and_freed_otherwise():
    model, seen = built(GOOD["linear predictor"]), []
    kept = KeptStates(model)
    for _ in range(3):
        with torch.no_grad(), modiff.trajectory(model):
            for x, t in inputs(0):
                model(x, t)
            if len(seen) < 2:
                kept.take()
            seen.append([t.data_ptr() for layer in kept.attachment.layers.values() for t in layer.loop.tensors()])
        assert state_bytes(model) == 0
    assert seen[0] == seen[1]
    assert len(seen[0]) == 20, "five layers, input and output, value and move"
    assert not set(seen[2]) & set(seen[0]), "a trajectory that is not recorded has memory of its own"
    assert kept.version == 1
    assert kept.bytes_held() > 0


@pytest.mark.gpu
def test_a_cuda_graph_gives_the_steps_that_python_gives():
    net: Any = HIDDEN["tiny"].build(torch.device("cuda"))[0]
    modiff.apply(net, presets.w8a8().on_integers())
    loop = Recorded(net, lambda x, t: net(x, t, return_dict=False)[0])
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        xs = (0.3 * torch.randn(9, 2, 1, 8, 8, generator=generator)).cumsum(0).cuda()
        steps = list(zip(xs, torch.arange(900, 0, -100).cuda()[:, None].expand(9, 2), strict=True))
        with torch.no_grad(), modiff.trajectory(net):
            wanted = torch.stack([net(x, t, return_dict=False)[0] for x, t in steps])
        assert_same_bits(run(loop, steps), wanted)
    assert loop.graph is not None
