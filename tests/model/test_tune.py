"""Tuning: picks what codes a model's real inputs best, by the reference's judgement too, and touches nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import nn

import modiff
from modiff import (
    CalibrationError,
    ConfigError,
    LayerConfig,
    ModiffConfig,
    ModiffWarning,
    ModulationConfig,
    QuantizerConfig,
    StateError,
    WeightConfig,
)
from modiff.model.attach import attachment_of
from modiff.model.tune import CLIPS, FINALISTS, GAINS, MANY_BITS_CLIPS, candidates, search_config
from tests.helpers import drifting
from tests.model.toys import activations_only, assert_equal, sample, toy


class Follower(nn.Module):
    """A network of one taken layer that reads what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(2, 2), nn.Linear(16, 16), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor, timestep: float) -> torch.Tensor:
        return self.layer(x)


TIMES = [1000.0 - 40.0 * t for t in range(25)]


def smooth_inputs() -> list[torch.Tensor]:
    """Each value swings slowly with a phase of its own, so that its change is nearly that of the step before."""
    phase, rate = 6 * torch.rand(8, 16), 0.15 * (1 + torch.rand(8, 16))
    size = torch.ones(16).index_fill_(0, torch.tensor([3]), 20.0)
    return [size * torch.sin(phase + rate * t) for t in range(25)]


def runs(model: nn.Module, inputs: list[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
    return torch.no_grad()(lambda: [model(x, t) for x, t in zip(inputs, TIMES, strict=True)])


def base_of(**settings: str) -> ModiffConfig:
    """The one layer of a `Follower` is both the first and the last."""
    return dataclasses.replace(activations_only(4, **settings), first_last="quantize")


def few(config: LayerConfig) -> list[LayerConfig]:
    """Published, clipped, linear, rotated."""
    clipped = dataclasses.replace(config, activation=dataclasses.replace(config.activation, clip=0.6))
    linear = dataclasses.replace(clipped, modulation=ModulationConfig(predictor="linear", gain=0.8))
    return [config, clipped, linear, dataclasses.replace(linear, rotation="hadamard")]


def test_the_choice_is_the_one_that_runs_best_and_beats_the_published_setting(monkeypatch):
    torch.manual_seed(3)
    model, inputs = Follower(), smooth_inputs()
    base, run_it, errors = base_of(granularity="sample"), runs(model, inputs), []
    exact, choices = torch.stack(run_it()), few(base.layer)
    for choice in choices:
        modiff.apply(model, dataclasses.replace(base, layer=choice))
        with modiff.trajectory(model):
            errors.append(float((torch.stack(run_it()) - exact).norm() / exact.norm()))
        modiff.remove(model)
    monkeypatch.setattr("modiff.model.tune.candidates", lambda base: choices)
    assert choices.index(search_config([model], run_it, base).layer) == errors.index(min(errors))
    assert min(errors) < 0.7 * errors[0]


def test_the_best_few_run_for_real_and_the_model_is_untouched_even_when_the_run_raises():
    model, runs = toy(), []
    modules, attributes, before = dict(model.named_modules()), set(model.__dict__), sample(model)

    def broken() -> None:
        sample(model, steps=2)
        raise KeyboardInterrupt

    modiff.tune(model, 4, run=lambda: runs.append(sample(model)))
    assert len(runs) == 1 + FINALISTS
    assert_equal(runs[0], before)  # probes do not disturb the network
    assert all(not torch.equal(outputs[-1], before[-1]) for outputs in runs[1:])
    with pytest.raises(KeyboardInterrupt):
        modiff.tune(model, 4, run=broken)
    assert dict(model.named_modules()) == modules
    assert set(model.__dict__) == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert_equal(sample(model), before)


@pytest.mark.parametrize(("scale", "predictor"), [(1e-3, "linear"), (1e3, "hold")])
def test_two_networks_get_one_config_judged_on_both_together(scale, predictor, monkeypatch):
    torch.manual_seed(3)
    models, noise = [Follower(), Follower()], drifting(0, (8, 16), 25, 0.3, torch.float32)
    first, second = runs(models[0], smooth_inputs()), runs(models[1], [scale * x for x in noise])

    # whichever network says more decides: smooth inputs extrapolate, noise holds
    base = base_of(granularity="sample")
    monkeypatch.setattr("modiff.model.tune.candidates", lambda base: few(base)[1:3])
    tuned = search_config(models, lambda: (first(), second()), base)
    assert tuned.layer.modulation.predictor == predictor
    assert all(attachment_of(model) is None for model in models)


def test_a_loop_that_stops_early_or_late_is_judged_by_where_it_got_to_and_other_shapes_are_refused():
    model, steps, batches = toy(), iter(range(6, 99)), iter(range(1, 99))
    assert modiff.tune(model, 4, run=lambda: sample(model, steps=next(steps))).layer.activation.bits == 4
    with pytest.raises(CalibrationError, match="expected run to evaluate the network on samples of the same shapes"):
        modiff.tune(model, 4, run=lambda: sample(model, batch=next(batches)))
    assert "_modiff" not in model.__dict__


def test_plain_is_tried_and_wins_where_the_loop_does_not_follow(monkeypatch):
    slow = LayerConfig(weight=WeightConfig(bits=None), activation=QuantizerConfig(bits=4, clip=0.01))
    monkeypatch.setattr("modiff.model.tune.candidates", lambda base: [candidates(base)[0], slow])
    model = Follower()
    assert search_config([model], runs(model, smooth_inputs()), base_of()).layer.modulation is None


def test_bits_weights_and_the_rest_of_the_config_are_kept():
    model = toy()
    layer = LayerConfig(modulation=ModulationConfig(first_step="coded", rounds=3, state_dtype="float64"))
    base = ModiffConfig(layer=layer, include=("attention.*",), share_residuals="off")
    tuned = modiff.tune(model, 3, config=base, weight_bits=4, run=lambda: sample(model))
    assert (tuned.layer.activation.bits, tuned.layer.weight.bits) == (3, 4)
    assert (tuned.include, tuned.share_residuals) == (base.include, "off")
    kept = tuned.layer.modulation
    assert (kept.first_step, kept.rounds, kept.state_dtype) == ("coded", 3, "float64")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_candidates_are_valid_different_and_include_the_published_setting(bits):
    base = LayerConfig(activation=QuantizerConfig(bits=bits))
    tuned = candidates(base)
    assert base in tuned
    assert len(set(tuned)) == len(tuned)
    assert tuned[0] == dataclasses.replace(base, modulation=None)
    linear = [c for c in tuned[1:] if c.modulation.predictor == "linear"]
    assert bool(linear) == (bits > 2)
    assert {c.modulation.gain for c in linear} == (set(GAINS) if bits > 2 else set())
    assert bits != 3 or all(c.activation.clip < 1 for c in linear)
    assert {c.activation.clip for c in tuned if c.rotation == "hadamard"} == set(CLIPS.get(bits, MANY_BITS_CLIPS))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: modiff.tune(m, 4), ConfigError, "expected run=, a function that runs one trajectory, got none"),
        (
            lambda m: modiff.apply(m) and modiff.tune(m, 4, run=print),
            StateError,
            "tune: expected a plain model",
        ),
        (lambda m: modiff.tune(m, 0, run=print), ConfigError, "tune: expected 2 to 8 activation bits, got 0"),
        (lambda m: modiff.tune(m, 1, run=print), ConfigError, "QuantizerConfig.bits: expected .* got 1"),
        (lambda m: modiff.tune(m, 4, run=print), CalibrationError, "expected two steps or more of a layer"),
    ],
)
def test_what_cannot_be_tuned_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(toy())


def test_a_layer_with_a_channel_that_dwarfs_the_others_is_left_and_named():
    model, x = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4))), torch.randn(8, 16)
    model[1].weight.data[3] = 1e6
    base = dataclasses.replace(activations_only(4), first_last="quantize")
    with pytest.warns(ModiffWarning, match=r"tune: .* 2 \(channels reach .*e\+06, the median one"):
        tuned = search_config([model], lambda: [model(x + 0.1 * step) for step in range(4)], base)
    assert tuned.exclude == ("2",)
