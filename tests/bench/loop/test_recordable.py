"""Steps that may be recorded repeat bit for bit, in this trajectory and the next; others are refused for cause."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import modiff
from loop.graphs import KeptStates
from loop.recordable import STEPS_BEFORE, recording_unsupported
from modiff import LayerConfig, ModiffConfig, ModulationConfig, QuantizerConfig, presets
from modiff.core.observers import MinMaxObserver
from modiff.kernels import kernel, native
from modiff.kernels.dispatch import Choice
from modiff.model.attach import Attachment, attachment_of
from modiff.model.trajectory import state_bytes
from tests.bench.loop.recorder import Recorder, Waits
from tests.helpers import assert_same_bits
from tests.model.toys import SHAPE, Toy, toy

STEPS = 8


def of(modulation: dict[str, Any] | None = None, **activation: Any) -> ModiffConfig:
    """4-bit residuals on integers, with these settings."""
    return ModiffConfig(
        layer=LayerConfig(
            activation=QuantizerConfig(**{"bits": 4, **activation}),
            modulation=ModulationConfig(**(modulation or {})),
            execution="integer",
        )
    )


GOOD = {
    "as published": presets.w8a4().on_integers(),
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


@pytest.fixture(autouse=True)
def _visible(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only kernels that torch dispatches: what runs through a library of ours is not recorded."""
    monkeypatch.setattr(Attachment, "_count_visits", lambda _: None)  # as on GPUs: it would wait for the device
    monkeypatch.setattr(native, "load", lambda *_: native.Native(None, "switched off"))
    monkeypatch.setattr(kernel, "plan", lambda *_: Choice("reference", "a test"))


def inputs(seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """A drifting x and falling timesteps at uneven distances."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [0.3 * torch.randn(SHAPE, generator=generator) for _ in range(STEPS)]
    times = [torch.tensor([1000.0 - 20 * i - 3 * i * i]) for i in range(STEPS)]
    return list(torch.stack(drawn).cumsum(0)), times


def built(config: ModiffConfig) -> Toy:
    model = toy()
    modiff.apply(model, config)
    if not config.layer.activation.dynamic:

        def run() -> None:
            with modiff.trajectory(model):
                eager(model, *inputs(9))

        modiff.calibrate(model, run)
    return model


def eager(model: nn.Module, xs: list[Tensor], ts: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [model(x, t) for x, t in zip(xs, ts, strict=True)]


class Loop:
    """As `eager`, but steps after the first ones are recorded once and then repeated."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.kept = model, KeptStates(model)
        self.x, self.t = torch.zeros(SHAPE), torch.zeros(1)
        self.recorder: Recorder | None = None
        self.output: Tensor | None = None

    def __call__(self, xs: list[Tensor], ts: list[Tensor]) -> list[Tensor]:
        found = []
        for step, (x, t) in enumerate(zip(xs, ts, strict=True)):
            self.x.copy_(x)
            self.t.copy_(t)
            with torch.no_grad():
                found.append(self._step(step).clone())
        return found

    def _step(self, step: int) -> Tensor:
        if step < STEPS_BEFORE:
            return self.model(self.x, self.t)
        if step == STEPS_BEFORE:
            self.kept.take()
        if self.recorder is None:
            self.recorder = Recorder()
            with self.recorder:
                self.output = self.model(self.x, self.t)
        else:
            self.recorder.replay()
        assert self.output is not None
        return self.output


def places(model: nn.Module) -> list[int]:
    return [t.data_ptr() for quantized in attachment_of(model).layers.values() for t in quantized.loop.tensors()]


@pytest.mark.parametrize("config", GOOD.values(), ids=GOOD)
def test_a_recorded_step_is_repeated_bit_for_bit_in_this_trajectory_and_the_next(config: ModiffConfig) -> None:
    model = built(config)
    assert recording_unsupported(model) == ""
    loop = Loop(model)
    for seed in (0, 1):
        with modiff.trajectory(model):
            expected = eager(model, *inputs(seed))
        with modiff.trajectory(model):
            found = loop(*inputs(seed))
        assert_same_bits(torch.stack(found), torch.stack(expected))
    assert len({tuple(x.flatten().tolist()) for x in expected}) == STEPS


@pytest.mark.parametrize(("config", "message"), BAD.values(), ids=BAD)
def test_what_is_refused_could_not_have_been_repeated(config: ModiffConfig, message: str) -> None:
    model = built(config)
    assert recording_unsupported(model).startswith(message)
    with modiff.trajectory(model):
        expected = eager(model, *inputs(0))
    try:
        with modiff.trajectory(model):
            found = Loop(model)(*inputs(0))
    except Waits:
        return
    assert not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_states_are_moved_to_where_they_were_recorded_and_freed_otherwise() -> None:
    model = built(GOOD["linear predictor"])
    kept, seen = KeptStates(model), []
    for _ in range(2):
        with modiff.trajectory(model):
            eager(model, *inputs(0))
            kept.take()
            seen.append(places(model))
        assert state_bytes(model) == 0
    assert seen[0] == seen[1]
    assert len(seen[0]) == 20, "five layers, input and output, value and move"
    assert kept.version == 1
    assert kept.bytes_held() > 0
    with modiff.trajectory(model):
        eager(model, *inputs(0))
        assert not set(places(model)) & set(seen[0])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_states_of_another_kind_take_new_places_and_a_higher_version(mode: Any) -> None:
    model = built(GOOD["as published"])
    kept, (xs, ts) = KeptStates(model), inputs(0)
    batches = (xs, [x[:1] for x in xs] if mode is torch.no_grad else xs)
    for version, (context, batch) in enumerate(zip((mode, torch.no_grad), batches, strict=True), 1):
        with context(), modiff.trajectory(model):
            eager(model, batch, ts)
            kept.take()
        assert kept.version == version


def test_while_scales_are_measured_nothing_may_be_recorded() -> None:
    model = built(BAD["static scales"][0])
    quantizer = attachment_of(model).layers["body"].quantizer
    assert quantizer is not None
    quantizer.watch(MinMaxObserver)
    assert recording_unsupported(model) == "body: its scales are being measured"
