"""Probes, tuning and autotune: errors as the reference gives them, the choice that runs best, a network left alone."""

import dataclasses
import json
import math
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
    presets,
)
from modiff.model.attach import attachment_of
from modiff.model.autotune import Seconds, choose, choose_modes, interleaved, measure_layer, signature
from modiff.model.probe import Probe, probes_of
from modiff.model.tune import CLIPS, FINALISTS, GAINS, MANY_BITS_CLIPS, candidates, search_config
from modiff.nn import Clock
from tests.helpers import drifting
from tests.model.toys import TAKEN, activations_only, applied, assert_equal, sample, toy
from tests.recipes import float64, recipe_of_layer
from tests.reference.recursion import run as play

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
TIMESTEPS = [1000.0, 900.0, 850.0, 650.0, 640.0, 300.0]
SIZES = [0.0, 100.0, 50.0, 200.0, 10.0, 340.0]


def judged(
    layer: nn.Module, config: LayerConfig, inputs: list[torch.Tensor], split: int | None = None
) -> tuple[float, float]:
    """Squared error of the input state and squared input, over the coded steps."""
    recipe = recipe_of_layer(layer, config, split)
    noise = signal = 0.0
    for t, step in enumerate(play(inputs, recipe, SIZES)):
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
    for t, time in enumerate(TIMESTEPS):
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
    """Clipped, linear."""
    clipped = dataclasses.replace(config, activation=dataclasses.replace(config.activation, clip=0.6))
    linear = dataclasses.replace(clipped, modulation=ModulationConfig(predictor="linear", gain=0.8))
    return [clipped, linear]


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
    monkeypatch.setattr("modiff.model.tune.candidates", few)
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
        (lambda m: modiff.apply(m) and modiff.tune(m, 4, run=print), StateError, "tune: expected a plain model"),
        (lambda m: modiff.tune(m, 0, run=print), ConfigError, "tune: expected 2 to 8 activation bits, got 0"),
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
    with pytest.warns(ModiffWarning, match=r"tune: .* 2 \(channels reach .*e\+06, the median of the others"):
        tuned = search_config([model], lambda: [model(x + 0.1 * step) for step in range(4)], base)
    assert tuned.exclude == ("2",)


SLOW_FLOATS = {"float": 3.0, "plain": 1.0, "modulated": 2.0}


@pytest.mark.parametrize(
    ("seconds", "errors", "tolerance", "choice", "reason"),
    [
        (SLOW_FLOATS, (0.01, 0.001), 0.01, "plain", "3.00x as fast as floats"),
        (SLOW_FLOATS, (0.0101, 0.001), 0.01, "modulated", "1.50x as fast as floats"),
        (SLOW_FLOATS, (0.5, 0.1), 0.01, "float", "no integers are exact enough"),
        ({"float": 1.0, "plain": 1.0, "modulated": 2.0}, (0.0, 0.0), 0.01, "float", "plain takes 1.00x the time"),
        ({"float": 1.0, "plain": 2.0, "modulated": 0.5}, (0.0, 0.0), 0.01, "modulated", "2.00x"),
    ],
)
def test_the_fastest_mode_within_the_tolerance_wins_and_floats_where_it_does_not_pay(
    seconds, errors, tolerance, choice, reason
):
    chosen, why = choose(seconds, errors, tolerance)
    assert chosen == choice
    assert reason in why
    assert choose(seconds, errors, tolerance, "its weight keeps floats") == (
        "float", "no integers: its weight keeps floats",
    )  # fmt: skip


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Times that are made up: convolutions pay, linear layers do not. Returns: what was measured."""
    measured: list[str] = []

    def made_up(layer: nn.Module, x: torch.Tensor, config: LayerConfig, split: int | None = None) -> Seconds:
        measured.append(signature(layer, x, config, split))
        return SLOW_FLOATS if isinstance(layer, nn.Conv2d) else {"float": 1.0, "plain": 2.0, "modulated": 3.0}

    monkeypatch.setattr("modiff.model.autotune.measure_layer", made_up)
    return measured


def run_autotune(model: nn.Module, config: ModiffConfig | None = None, **words: object) -> modiff.AutotuneResult:
    return choose_modes([model], lambda: sample(model), config or presets.w8a8(), **words)


def test_the_config_does_what_the_rows_say(times):
    model = toy()
    result = run_autotune(model, tolerance=0.5)
    assert [row.name for row in result.rows] == list(TAKEN)
    assert {row.name: row.choice for row in result.rows} == {"body": "plain"} | dict.fromkeys(TAKEN[1:], "float")
    report = modiff.apply(model, result.config)
    assert [entry.name for entry in report.taken] == ["body"]
    assert report.taken[0].config == LayerConfig(modulation=None, execution="integer")
    static = ModiffConfig(layer=LayerConfig(activation=QuantizerConfig(dynamic=False)))
    judged = run_autotune(toy(), static, tolerance=0.5)  # by scales that are measured at each call
    assert judged.rows[0].choice == "plain"
    assert not judged.config.layer.activation.dynamic


def test_a_tighter_tolerance_turns_plain_layers_into_modulated_ones(times):
    model = toy()
    (body, *_) = run_autotune(model, tolerance=0.5).rows
    plain, modulated = body.errors
    assert modulated < plain
    result = run_autotune(model, tolerance=(plain + modulated) / 2)
    assert result.rows[0].choice == "modulated"
    assert result.state_bytes == result.rows[0].state_bytes == 4 * (2 * 16 * 4 * 4 + 2 * 16 * 4 * 4)
    modiff.apply(model, result.config)
    assert model.body.inputs is not None
    assert run_autotune(toy(), tolerance=modulated / 2).rows[0].choice == "float"


def test_the_same_profile_measures_nothing_again_and_seconds_are_summed_over_the_calls_of_an_evaluation(times):
    profile: dict[str, Seconds] = {}
    result = run_autotune(toy(), tolerance=0.5, profile=profile)
    assert run_autotune(toy(), tolerance=0.5, profile=profile) == result
    assert len(times) == len(set(times)) == len(profile) == 2  # all linear layers are alike
    assert [row.calls for row in result.rows] == [1.0] * 5
    assert (result.seconds("float"), result.seconds("plain"), result.seconds()) == (7.0, 9.0, 5.0)
    text = str(result)
    assert "4 float, 1 plain, 0 modulated; layers of one evaluation: 5000.0 ms as chosen, all float 7000.0" in text
    assert json.loads(json.dumps(result.to_dict()))["layers"][0]["choice"] == "plain"


def test_a_layer_is_timed_in_all_three_modes_and_each_signature_stands_for_one_kind():
    layer, x = nn.Conv2d(8, 8, 3, padding=1), torch.randn(2, 8, 6, 6)
    result = measure_layer(layer, x, LayerConfig())
    assert set(result) == {"float", "plain", "modulated"}
    assert all(0 < seconds < 60 for seconds in result.values())
    base = signature(layer, x, LayerConfig(), None)
    others = [
        signature(nn.Conv2d(8, 8, 3), x, LayerConfig(), None),
        signature(layer, x[:1], LayerConfig(), None),
        signature(layer, x.bfloat16(), LayerConfig(), None),
        signature(layer, x, LayerConfig(activation=QuantizerConfig(bits=4)), None),
        signature(layer, x, LayerConfig(), 3),
    ]
    assert len({base, *others}) == 6
    assert signature(nn.Conv2d(8, 8, 3, padding=1), torch.zeros_like(x), LayerConfig(), None) == base


def test_a_run_on_a_gpu_ends_when_the_gpu_is_done(monkeypatch):
    """And every round has every run in turn, after one that does not count."""
    called: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: called.append("|"))
    times = interleaved({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, 2)
    assert "".join(called) == "ab" + "|a||b|" * 2
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 2, "b": 2}


@pytest.mark.parametrize(
    ("config", "words", "message"),
    [
        (None, {"tolerance": 0}, "autotune.tolerance: expected a relative error above 0, got 0"),
        (presets.plain(), {}, "autotune.config: expected modulation, got None"),
        (ModiffConfig(overrides=(("body", LayerConfig()),)), {}, "autotune.config: expected no overrides"),
    ],
)
def test_what_cannot_be_autotuned_is_refused(config, words, message):
    with pytest.raises(ConfigError, match=message):
        run_autotune(toy(), config, **words)
    with pytest.raises(CalibrationError, match="autotune: expected two steps or more of a layer"):
        choose_modes([model := toy()], lambda: sample(model, steps=1), presets.w8a8())
    with pytest.raises(StateError, match="autotune: expected a plain model, got Toy with modulated layers"):
        run_autotune(applied())
