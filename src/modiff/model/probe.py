"""Watch full-precision layers, and run the input side of candidate settings beside them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from modiff.config import LayerConfig
from modiff.core.hadamard import rotate
from modiff.core.quantizer import Quantizer
from modiff.core.recursion import State, compute_dtype, encode
from modiff.errors import ConfigError
from modiff.model.attach import ATTRIBUTE, Attachment
from modiff.model.report import Report
from modiff.nn import Clock, ModulatedLayer, quantized_class


class Probe:
    """Runs the input side of every candidate beside one full-precision layer."""

    def __init__(
        self, layer: nn.Module, name: str, choices: list[LayerConfig], clock: Clock, split: int | None = None
    ) -> None:
        kind = quantized_class(layer)
        if kind is None:
            raise ConfigError(
                f"{name}: expected a layer with a modulated quantized, got {type(layer).__name__}. Exclude it."
            )
        self.name, self.clock = name, clock
        self.layers: list[ModulatedLayer] = [
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
        states = self.states.setdefault(self.clock.context, [None] * len(self.layers))
        rotated: dict[object, Tensor] = {None: x}
        for i, quantized in enumerate(self.layers):
            if quantized.segments not in rotated:
                rotated[quantized.segments] = rotate(x.float(), quantized.segments or (), quantized.channel_dim)
            states[i] = self._advance(i, quantized, rotated[quantized.segments], states[i])
        if not starts:
            self.signal += float(x.float().square().sum())

    def _advance(self, i: int, quantized: ModulatedLayer, value: Tensor, state: State | None) -> State | None:
        if quantized.quantizer is None:
            raise ConfigError(
                f"{quantized.name}: expected a candidate with activation bits, got none. Floats have no error "
                f"to measure. "
                "Give it 2 to 8 bits."
            )
        if quantized.config.modulation is None:
            return self._plain(i, quantized.quantizer, value, state)
        ratio = self.clock.ratio if state is not None else 1.0
        _, state_now = encode(value, state, quantized.quantizer, quantized.config.modulation, ratio)
        if state is not None:
            error = value.to(compute_dtype(quantized.config.modulation)) - state_now.value
            self.noise[i] += float(error.square().sum())
        return state_now

    def _plain(self, i: int, quantizer: Quantizer, value: Tensor, seen: State | None) -> State:
        """The error of coding the input from nothing; counted from the second step on, as that of the others."""
        if seen is not None:
            code = quantizer(value.float())
            self.noise[i] += float((value.float() - (0.0 if code is None else code.value())).square().sum())
        return State(value)

    def errors(self) -> list[float]:
        """Relative error of each candidate over all coded steps; NaN if there were none."""
        if self.signal == 0:
            return [math.nan] * len(self.layers)
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
