"""Watch full-precision layers, and run the input side of candidate settings beside them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from modiff.config import LayerConfig
from modiff.core.coder import Coder
from modiff.core.modulation import State, compute_dtype, encode
from modiff.core.transforms import rotate
from modiff.errors import ConfigError
from modiff.model.attachment import ATTRIBUTE, Attachment
from modiff.model.report import Report
from modiff.nn import Clock, ModulatedLayer, twin_of


class Probe:
    """Runs the input side of every candidate beside one full-precision layer."""

    def __init__(
        self, layer: nn.Module, name: str, choices: list[LayerConfig], clock: Clock, split: int | None = None
    ) -> None:
        kind = twin_of(layer)
        if kind is None:
            raise ConfigError(
                f"{name}: expected a layer with a modulated twin, got {type(layer).__name__}. Exclude it."
            )
        self.name, self.clock = name, clock
        self.twins: list[ModulatedLayer] = [
            kind.from_float(layer, c, name=name, clock=clock, split=split) for c in choices
        ]
        self.states: dict[str, list[State | None]] = {}
        self.noise = torch.zeros(len(choices), dtype=torch.float64)
        self.signal = 0.0
        clock.on_reset(self.states.clear)

    def __call__(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook: one step of every candidate."""
        x: Tensor = args[0].detach()
        starts = self.clock.context not in self.states
        states = self.states.setdefault(self.clock.context, [None] * len(self.twins))
        rotated: dict[object, Tensor] = {None: x}
        for i, twin in enumerate(self.twins):
            if twin.segments not in rotated:
                rotated[twin.segments] = rotate(x.float(), twin.segments or (), twin.channel_dim)
            states[i] = self._advance(i, twin, rotated[twin.segments], states[i])
        if not starts:
            self.signal += float(x.float().square().sum())

    def _advance(self, i: int, twin: ModulatedLayer, value: Tensor, state: State | None) -> State | None:
        if twin.coder is None:
            raise ConfigError(
                f"{twin.name}: expected a candidate with activation bits, got none. Floats have no error to measure. "
                "Give it 2 to 8 bits."
            )
        if twin.config.modulation is None:
            return self._plain(i, twin.coder, value, state)
        ratio = self.clock.ratio if state is not None else 1.0
        _, state_now = encode(value, state, twin.coder, twin.config.modulation, ratio)
        if state is not None:
            error = value.to(compute_dtype(twin.config.modulation)) - state_now.value
            self.noise[i] += float(error.square().sum())
        return state_now

    def _plain(self, i: int, coder: Coder, value: Tensor, seen: State | None) -> State:
        """The error of coding the input from nothing; counted from the second step on, as that of the others."""
        if seen is not None:
            code = coder(value.float())
            self.noise[i] += float((value.float() - (0.0 if code is None else code.value())).square().sum())
        return State(value)

    def errors(self) -> list[float]:
        """Relative error of each candidate over all coded steps; NaN if there were none."""
        if self.signal == 0:
            return [math.nan] * len(self.twins)
        return [math.sqrt(float(n) / self.signal) for n in self.noise]


@contextmanager
def probes_of(
    model: nn.Module, report: Report, choices: list[LayerConfig], splits: Mapping[str, int]
) -> Iterator[list[Probe]]:
    """Probes on the layers that `report` takes, while the body runs one trajectory; the model computes as ever."""
    clock = Clock(type(model).__name__)
    watcher = Attachment(clock, report)
    watcher.watch(model)
    probes: list[Probe] = []
    try:
        for entry in report.taken:
            layer = model.get_submodule(entry.name)
            probes.append(Probe(layer, entry.name, choices, clock, splits.get(entry.name)))
            watcher.handles.append(layer.register_forward_pre_hook(probes[-1]))
        clock.start()
        model.__dict__[ATTRIBUTE] = watcher  # contexts of guidance find the clock here
        yield probes
    finally:
        model.__dict__.pop(ATTRIBUTE, None)
        clock.stop()
        for handle in watcher.handles:
            handle.remove()
