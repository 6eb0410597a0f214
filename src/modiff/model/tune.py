"""Pick clip ratio, predictor, gain and rotation for a model at a bit width, from a few short trajectories."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from modiff.config import LayerConfig, ModiffConfig, ModulationConfig, Predictor, Rotation
from modiff.errors import CalibrationError, ConfigError, StateError
from modiff.model.apply import apply
from modiff.model.attachment import attachment_of
from modiff.model.probe import probes_of
from modiff.model.remove import remove
from modiff.model.select import select
from modiff.model.trajectory import trajectory

CLIPS = {2: (0.6, 0.45, 0.3), 3: (0.8, 0.6, 0.45, 0.3), 4: (1.0, 0.8, 0.6)}
"""Clip ratios worth trying at so many bits; the fewer codes there are, the more it pays to cut the tails."""
MANY_BITS_CLIPS = (1.0, 0.8)
GAINS = (0.5, 0.8, 1.0)
FINALISTS = 4
"""How many candidates run for real."""


def candidates(base: LayerConfig) -> list[LayerConfig]:
    """The settings that `tune` tries: the published one, and rotated ones of either predictor over clips and gains.

    Those that the guards of `LayerConfig` refuse, because the loop would diverge, are left out.
    """
    modes: list[tuple[Predictor, float]] = [("hold", 1.0)]
    modes += [("linear", gain) for gain in GAINS]
    found = [_candidate(base, "none", "hold", 1.0, 1.0)]
    for predictor, gain in modes:
        for clip in CLIPS.get(base.activation.bits or 8, MANY_BITS_CLIPS):
            try:
                found.append(_candidate(base, "hadamard", predictor, gain, clip))
            except ConfigError:  # a guard: this pair of bits and predictor diverges
                continue
    return found


def _candidate(base: LayerConfig, rotation: Rotation, predictor: Predictor, gain: float, clip: float) -> LayerConfig:
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
    splits: Mapping[str, int] | None = None,
) -> ModiffConfig:
    """The config with the settings that keep the network closest to full precision.

    Two stages. On one full-precision trajectory every candidate runs its input side, â_t = p_t + code(a_t - p_t), and
    is judged by ||a_t - â_t|| / ||a_t||: no operator is needed, so all run in one pass. Then the best few run for real,
    and the one whose samples reach the last evaluation with the least mean relative L2 error wins.

    Args:
        run: runs one trajectory at the number of steps to be used later, the same each time it is called.
        config: bits and selection; its activation bits must be 2 to 8.
        choices: settings to try; `candidates(config.layer)` when None.
        granularity: "model" for one setting; "layer" lets the best setting of each layer, as overrides, compete too.
        splits: as for `apply`.
    Raises: StateError if modiff is on the model; CalibrationError if `run` never reached a second step.
    Cost: a full-precision trajectory with one prologue per candidate, layer and step, and an input state per candidate;
        then `FINALISTS` modulated trajectories.
    """
    _check(model, config)
    choices = candidates(config.layer) if choices is None else choices
    report = select(model, config, splits=splits)
    with _tracked(model) as reference, probes_of(model, report, choices) as probes:
        run()
    errors = {name: probe.errors() for name, probe in probes.items()}
    if any(not math.isfinite(e) for row in errors.values() for e in row):
        raise CalibrationError(
            "tune: expected at least two steps of every layer, got fewer. `run` must run a whole trajectory. "
            "Give more steps, or exclude layers that do not run."
        )
    finalists = [dataclasses.replace(config, layer=layer) for layer in _shortlist(choices, errors)]
    if granularity == "layer":
        best = tuple((name, choices[row.index(min(row))]) for name, row in errors.items())
        finalists.append(dataclasses.replace(config, overrides=config.overrides + best))
    scores = [_trajectory_error(model, run, finalist, reference, splits) for finalist in finalists]
    return finalists[scores.index(min(scores))]


def _check(model: nn.Module, config: ModiffConfig) -> None:
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


def _shortlist(choices: list[LayerConfig], errors: dict[str, list[float]]) -> list[LayerConfig]:
    """The best clip of each predictor, gain and rotation by the mean log error of the layers; the best few of these.

    A layer's own error tells clips apart well, predictors less so: what errors do to the trajectory decides those.
    """
    scores = [sum(math.log(row[i] + 1e-12) for row in errors.values()) for i in range(len(choices))]
    best: dict[object, LayerConfig] = {}
    for i in sorted(range(len(choices)), key=scores.__getitem__):
        best.setdefault((choices[i].rotation, choices[i].modulation), choices[i])
    return list(best.values())[:FINALISTS]


class _Track:
    """What an evaluation of the network was given and gave back: samples the size of a latent, kept for all steps."""

    def __init__(self) -> None:
        self.samples: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [
            v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point() and v.dim() > 1
        ]
        self.samples += [given[0].detach().clone()] if given else []

    def after(self, _module: nn.Module, _args: object, output: Any) -> None:
        tensor = output if isinstance(output, Tensor) else output[0]
        self.outputs.append(tensor.detach().clone())

    def shapes(self) -> list[torch.Size]:
        return [t.shape for t in (*self.samples, *self.outputs)]


@contextmanager
def _tracked(model: nn.Module) -> Iterator[_Track]:
    track = _Track()
    handles = [
        model.register_forward_pre_hook(track.before, with_kwargs=True),
        model.register_forward_hook(track.after),
    ]
    try:
        yield track
    finally:
        for handle in handles:
            handle.remove()


def _trajectory_error(
    model: nn.Module,
    run: Callable[[], object],
    config: ModiffConfig,
    reference: _Track,
    splits: Mapping[str, int] | None,
) -> float:
    """Mean relative L2 of the samples that reach the last evaluation; infinite when a loop diverged.

    Where outputs do not feed back into inputs, the samples are equal and the outputs of all evaluations are compared.
    """
    apply(model, config, splits=splits)
    try:
        with _tracked(model) as track, trajectory(model):
            run()
    finally:
        remove(model)
    if track.shapes() != reference.shapes() or not track.outputs:
        raise CalibrationError(
            f"tune: expected run to evaluate the network {len(reference.outputs)} times as before, got "
            f"{len(track.outputs)} times or other shapes. It must run the same trajectory at each call. "
            "Fix its seed, steps and batch."
        )
    mine, true = track.samples[-1:], reference.samples[-1:]
    if all(map(torch.equal, mine, true)):
        mine, true = track.outputs, reference.outputs
    score = _relative_error(mine, true)
    return score if math.isfinite(score) else math.inf


def _relative_error(mine: list[Tensor], true: list[Tensor]) -> float:
    """Mean over the samples of ||mine - true|| / ||true||, the tensors of a sample taken together.

    A mean square would be the error of the one sample that tips over to another image; a mean logarithm would miss it.
    """
    noise = sum((m.double() - t.double()).flatten(1).square().sum(1) for m, t in zip(mine, true, strict=True))
    signal = sum(t.double().flatten(1).square().sum(1) for t in true)
    return float(torch.as_tensor(noise / signal).sqrt().mean())
