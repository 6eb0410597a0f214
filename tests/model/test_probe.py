"""Probes: the error of each candidate's input side, as the reference gives it, beside an untouched network."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from modiff import LayerConfig, ModulationConfig, QuantizerConfig, WeightConfig
from modiff.model.attach import attachment_of
from modiff.model.probe import Probe, probes_of
from modiff.nn import Clock
from tests.helpers import drifting
from tests.model.toys import TAKEN, activations_only, assert_equal, sample, toy
from tests.recipes import float64, recipe_of_layer
from tests.reference.recursion import run

PUBLISHED = float64(LayerConfig(weight=WeightConfig(bits=None), activation=QuantizerConfig(bits=3)))
CHOICES = [
    PUBLISHED,
    dataclasses.replace(PUBLISHED, activation=QuantizerConfig(bits=3, clip=0.5)),
    dataclasses.replace(PUBLISHED, rotation="hadamard"),
    dataclasses.replace(
        PUBLISHED,
        activation=QuantizerConfig(bits=4),
        modulation=ModulationConfig(predictor="linear", gain=0.7, state_dtype="float64"),
    ),
]
TIMES = [1000.0, 900.0, 850.0, 650.0, 640.0, 300.0]
SIZES = [0.0, 100.0, 50.0, 200.0, 10.0, 340.0]


def judged(
    layer: nn.Module, config: LayerConfig, inputs: list[torch.Tensor], split: int | None = None
) -> tuple[float, float]:
    """Squared error of the input state and squared input, over the coded steps."""
    recipe = recipe_of_layer(layer, config, split)
    noise = signal = 0.0
    for t, step in enumerate(run(inputs, recipe, SIZES)):
        if t:
            turned = inputs[t] if recipe.matrix is None else inputs[t] @ recipe.matrix.T
            noise += float((turned - step.input_state).square().sum())
            signal += float(inputs[t].square().sum())
    return noise, signal


def probed(
    layer: nn.Module, choices: list[LayerConfig], runs: dict[str, list[torch.Tensor]], split: int | None
) -> Probe:
    """A probe that saw the runs step by step, each in its context."""
    clock = Clock("model")
    probe = Probe(layer, "layer", choices, clock, split)
    clock.start()
    for t, time in enumerate(TIMES):
        for name, inputs in runs.items():
            clock.context = name
            clock.call(time)
            probe.see(inputs[t])
            clock.returned()
    return probe


@pytest.mark.parametrize("split", [None, 5])
def test_errors_are_those_of_the_reference_over_all_coded_steps_and_contexts(split):
    """Each half of a split input has a scale of its own."""
    layer = nn.Linear(16, 4).double()
    runs = {name: [x.float().double() for x in drifting(seed, (2, 3, 16), 6, 0.2)] for seed, name in enumerate("ab")}
    for x in (x for inputs in runs.values() for x in inputs):
        x[..., :5] *= 100 if split else 1
    choices = CHOICES[:2] if split else CHOICES
    for choice, error in zip(choices, probed(layer, choices, runs, split).errors(), strict=True):
        noises, signals = zip(*(judged(layer, choice, inputs, split) for inputs in runs.values()), strict=True)
        assert error == pytest.approx(math.sqrt(sum(noises) / sum(signals)), rel=1e-5)  # rotated inputs are float32


def test_the_error_of_a_plain_candidate_is_that_of_coding_each_input_from_nothing():
    """The first step is full precision for modulated candidates: it is not counted for anyone."""
    inputs = drifting(0, (3, 16), 6, 0.3, torch.float32)
    plain = LayerConfig(activation=QuantizerConfig(bits=4), modulation=None)
    x = torch.stack(inputs[1:]).double()
    scale = x.abs().amax(-1, keepdim=True) / 7
    expected = float((x - (x / scale).round() * scale).norm() / x.norm())
    assert probed(nn.Linear(16, 4), [plain], {"default": inputs}, None).errors() == [pytest.approx(expected, rel=1e-5)]


def test_the_layers_that_a_config_takes_get_a_probe_and_the_network_computes_as_ever():
    model = toy()
    with probes_of(model, activations_only(3), [PUBLISHED], {"body": 5}) as probes:
        outputs = sample(model)
        assert attachment_of(model) is not None
    assert {probe.name: probe.layers[0].spec.split for probe in probes} == dict.fromkeys(TAKEN) | {"body": 5}
    assert all(0 < probe.errors()[0] < 0.5 for probe in probes)
    assert_equal(outputs, sample(toy()))
