"""Pick clip ratio, predictor, gain and rotation for a model at a bit width, from one full-precision trajectory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from modiff.config import LayerConfig, ModiffConfig, ModulationConfig, Predictor, Rotation
from modiff.core.modulation import State, compute_dtype, encode
from modiff.core.transforms import rotate
from modiff.errors import CalibrationError, ConfigError, StateError
from modiff.model.attachment import Attachment, attachment_of
from modiff.model.report import Report
from modiff.model.select import select
from modiff.nn import Clock, ModulatedLayer, twin_of

CLIPS = (1.0, 0.8, 0.6, 0.45, 0.3)
GAINS = (0.5, 0.8, 1.0)


def candidates(base: LayerConfig, rotation: Literal["auto"] | Rotation = "auto") -> list[LayerConfig]:
    """The settings that `tune` tries: hold and linear predictors, clip ratios, gains; those the guards refuse left out.

    "auto" rotates all but the three unrotated hold candidates with the widest clips.
    """
    found: list[LayerConfig] = []
    modes: list[tuple[Predictor, float]] = [("hold", 1.0), *[("linear", g) for g in GAINS]]  # type: ignore[list-item]
    for turned in ("hadamard", "none") if rotation == "auto" else (rotation,):
        for predictor, gain in modes:
            for clip in CLIPS:
                if rotation == "auto" and turned == "none" and (predictor == "linear" or clip < 0.6):
                    continue
                try:
                    found.append(_candidate(base, turned, predictor, gain, clip))
                except ConfigError:  # a guard: this pair of bits and predictor diverges
                    continue
    return found


def _candidate(base: LayerConfig, rotation: Any, predictor: Predictor, gain: float, clip: float) -> LayerConfig:
    activation = dataclasses.replace(base.activation, clip=clip)
    modulation = dataclasses.replace(base.modulation or ModulationConfig(), predictor=predictor, gain=gain)
    return dataclasses.replace(base, activation=activation, modulation=modulation, rotation=rotation)


def tune(
    model: nn.Module,
    run: Callable[[], object],
    config: ModiffConfig,
    *,
    choices: list[LayerConfig] | None = None,
    granularity: Literal["model", "layer"] = "model",
) -> ModiffConfig:
    """The config with the settings that follow the layers' inputs best.

    Each candidate runs its input side, â_t = p_t + code(a_t - p_t), on the inputs that the full-precision network
    really has, and is judged by ||a_t - â_t|| / ||a_t|| over the trajectory: no operator is needed, so all candidates
    run in one pass. "model" takes the candidate with the least mean log error; "layer" the best of each layer, as
    overrides.

    Args:
        run: runs whole trajectories of the model at the number of steps to be used later.
        config: bits and selection; its activation bits must be 2 to 8.
        choices: settings to try; `candidates(config.layer)` when None.
    Raises: StateError if modiff is on the model; CalibrationError if `run` never reached a second step.
    Cost: one full-precision trajectory plus one prologue per candidate, layer and step; an input state per candidate.
    """
    if attachment_of(model) is not None:
        raise StateError(
            "tune: expected a plain model, got one with modulated layers. It is judged against full precision. "
            "Call modiff.remove(model) first."
        )
    if config.layer.activation.bits in (None, 0):
        raise ConfigError(
            f"tune: expected 2 to 8 activation bits, got {config.layer.activation.bits}. There is no code to tune. "
            "Give bits=4."
        )
    choices = candidates(config.layer) if choices is None else choices
    report = select(model, config)
    with _probes(model, report, choices) as probes:
        run()
    errors = {name: probe.errors() for name, probe in probes.items()}
    if any(not math.isfinite(e) for row in errors.values() for e in row) or not errors:
        raise CalibrationError(
            "tune: expected at least two steps of every layer, got fewer. `run` must run whole trajectories. "
            "Give more steps, or exclude layers that do not run."
        )
    if granularity == "layer":
        chosen = tuple((name, choices[row.index(min(row))]) for name, row in errors.items())
        return dataclasses.replace(config, overrides=config.overrides + chosen)
    means = [sum(math.log(row[i] + 1e-12) for row in errors.values()) for i in range(len(choices))]
    return dataclasses.replace(config, layer=choices[means.index(min(means))])


class _Probe:
    """Runs the input side of every candidate beside one full-precision layer."""

    def __init__(self, layer: nn.Module, name: str, choices: list[LayerConfig], clock: Clock) -> None:
        kind = twin_of(layer)
        if kind is None:
            raise ConfigError(
                f"{name}: expected a layer with a modulated twin, got {type(layer).__name__}. Exclude it."
            )
        self.clock = clock
        self.twins: list[ModulatedLayer] = [kind.from_float(layer, c, name=name, clock=clock) for c in choices]
        self.states: dict[str, list[State | None]] = {}
        self.noise = torch.zeros(len(choices), dtype=torch.float64)
        self.signal = 0.0
        clock.on_reset(self.states.clear)

    def __call__(self, _: nn.Module, args: tuple[Any, ...]) -> None:
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

    def _advance(self, i: int, twin: ModulatedLayer, value: Tensor, state: State | None) -> State:
        if twin.coder is None or twin.config.modulation is None:
            raise ConfigError(
                f"{twin.name}: expected a modulated candidate, got a plain one. Plain layers need no tuning."
            )
        ratio = self.clock.ratio if state is not None else 1.0
        _, state_now = encode(value, state, twin.coder, twin.config.modulation, ratio)
        if state is not None:
            error = value.to(compute_dtype(twin.config.modulation)) - state_now.value
            self.noise[i] += float(error.square().sum())
        return state_now

    def errors(self) -> list[float]:
        """Relative error of each candidate over all coded steps; NaN if there were none."""
        if self.signal == 0:
            return [math.nan] * len(self.twins)
        return [math.sqrt(float(n) / self.signal) for n in self.noise]


@contextmanager
def _probes(model: nn.Module, report: Report, choices: list[LayerConfig]) -> Iterator[dict[str, _Probe]]:
    clock = Clock(type(model).__name__)
    watcher = Attachment(clock, report)
    watcher.watch(model)
    probes: dict[str, _Probe] = {}
    try:
        for entry in report.taken:
            layer = model.get_submodule(entry.name)
            probes[entry.name] = _Probe(layer, entry.name, choices, clock)
            watcher.handles.append(layer.register_forward_pre_hook(probes[entry.name]))
        clock.start()
        yield probes
    finally:
        clock.stop()
        for handle in watcher.handles:
            handle.remove()
