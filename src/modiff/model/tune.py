"""Pick plain or modulated, clip ratio, predictor, gain and rotation for a model at a bit width, from a few runs."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress

import torch
from torch import nn

from modiff.config import LayerConfig, ModiffConfig, ModulationConfig, Rotation
from modiff.errors import CalibrationError, ConfigError
from modiff.model.apply import install, uninstall
from modiff.model.attach import check_searchable
from modiff.model.probe import Probe, probes_of, tracked, without_unfit
from modiff.model.select import layer_names
from modiff.model.trajectory import model_trajectory

CLIPS = {2: (0.6, 0.45, 0.3), 3: (0.8, 0.6, 0.45, 0.3), 4: (1.0, 0.8, 0.6)}
MANY_BITS_CLIPS = (1.0, 0.8)
"""Clip ratios worth trying, by bits; the fewer codes there are, the more it pays to cut the tails."""
GAINS, FINALISTS = (0.5, 0.8, 1.0), 5
"""Of the linear predictor; how many candidates run for real, the plain one among them."""


def candidates(base: LayerConfig) -> list[LayerConfig]:
    """The settings that `tune` tries: plain, published, and rotated ones of either predictor over clips and gains."""
    activation = dataclasses.replace(base.activation, clip=1.0, refresh_every=1)
    plain = dataclasses.replace(base, activation=activation, modulation=None, rotation="none")
    settings = [plain, _candidate(base, "none", "hold", 1.0, 1.0)]
    for predictor, gain in [("hold", 1.0), *(("linear", gain) for gain in GAINS)]:
        for clip in CLIPS.get(base.activation.bits or 8, MANY_BITS_CLIPS):
            with suppress(ConfigError):  # some diverge
                settings.append(_candidate(base, "hadamard", predictor, gain, clip))
    return settings


def _candidate(base: LayerConfig, rotation: Rotation, predictor: str, gain: float, clip: float) -> LayerConfig:
    activation = dataclasses.replace(base.activation, clip=clip)
    modulation = dataclasses.replace(base.modulation or ModulationConfig(), predictor=predictor, gain=gain)
    return dataclasses.replace(base, activation=activation, modulation=modulation, rotation=rotation)


def with_bits(config: ModiffConfig, weight_bits: int | None, activation_bits: int) -> ModiffConfig:
    """The config to search from at other bit widths: modulated, with the published predictor."""
    layer = dataclasses.replace(
        config.layer,
        weight=dataclasses.replace(config.layer.weight, bits=weight_bits),
        activation=dataclasses.replace(config.layer.activation, bits=activation_bits),
        modulation=dataclasses.replace(config.layer.modulation or ModulationConfig(), predictor="hold"),
    )
    return dataclasses.replace(config, layer=layer)


def search_config(
    models: Sequence[nn.Module],
    run: Callable[[], object],
    config: ModiffConfig,
    *,
    splits: Sequence[Mapping[str, int]] = (),
) -> ModiffConfig:
    """The config with the settings that keep the samples closest to full precision, as `modiff.tune` says.

    Two stages. One full-precision trajectory gives every candidate's error of the input state, ||a_t - â_t|| / ||a_t||.
    Then the best few run for real, and the one with the least error of the last samples wins: on all networks together.
    Raises: StateError if modiff is on a model; CalibrationError if `run` never reached a second step.
    """
    check_searchable(models, config, "tune")
    choices, splits, run = candidates(config.layer), list(splits) or [{}] * len(models), torch.no_grad()(run)
    known, probes = layer_names(models), list[Probe]()
    with tracked(models) as exact, ExitStack() as stack:
        for model, its_splits in zip(models, splits, strict=True):
            probes += stack.enter_context(probes_of(model, config, choices, its_splits, known))
        run()
    config, fit = without_unfit("tune", config, probes)
    errors = [probe.errors() for probe in fit]
    finalists = [dataclasses.replace(config, layer=layer) for layer in _shortlist(choices, errors)]

    def sample_error(finalist: ModiffConfig) -> float:
        """Mean relative L2 of the samples that reach the last evaluation, however many; infinite if it diverged."""
        with ExitStack() as stack:
            for model, its_splits in zip(models, splits, strict=True):
                install(model, finalist, splits=its_splits, known=known)
                stack.callback(uninstall, model)
                stack.enter_context(model_trajectory(model))
            track = stack.enter_context(tracked(models))
            run()
        pairs = list(zip(track.samples[-1:], exact.samples[-1:], strict=False))
        if all(torch.equal(*pair) for pair in pairs):  # outputs do not feed back into inputs: compare all of them
            pairs = list(zip(track.outputs, exact.outputs, strict=False))
        if not pairs or any(ours.shape != theirs.shape for ours, theirs in pairs):
            raise CalibrationError(
                "tune: expected run to evaluate the network on samples of the same shapes as before, got others or "
                "none. It must run the same trajectory at each call. Fix its seed, steps and batch."
            )
        noise = sum((ours.double() - theirs.double()).flatten(1).square().sum(1) for ours, theirs in pairs)
        signal = sum(theirs.double().flatten(1).square().sum(1) for _, theirs in pairs)
        # a mean square would be that of the one sample that tips over to another image, a mean logarithm would miss it
        score = float(torch.as_tensor(noise / signal).sqrt().mean())
        return score if math.isfinite(score) else math.inf

    return min(finalists, key=sample_error)


def _shortlist(choices: list[LayerConfig], errors: list[list[float]]) -> list[LayerConfig]:
    """Plain, and the best clip of each predictor, gain and rotation by the layers' mean log error: the best few."""
    scores = [sum(math.log(row[i] + 1e-12) for row in errors) for i in range(len(choices))]
    best: dict[object, LayerConfig] = {}
    for i in sorted(range(len(choices)), key=scores.__getitem__):
        best.setdefault((choices[i].rotation, choices[i].modulation), choices[i])
    plain = [choice for choice in best.values() if choice.modulation is None]
    return plain + [choice for choice in best.values() if choice.modulation is not None][: FINALISTS - len(plain)]
