"""Autotune: each layer gets the fastest mode that is exact enough, from times that are given or measured."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

import modiff
from modiff import CalibrationError, ConfigError, LayerConfig, ModiffConfig, QuantizerConfig, StateError, presets
from modiff.model.autotune import Seconds, choose, choose_modes, interleaved, measure_layer, signature
from tests.model.toys import TAKEN, applied, sample, toy

SLOW_FLOATS = {"float": 3.0, "plain": 1.0, "modulated": 2.0}


@pytest.mark.parametrize(
    ("seconds", "errors", "tolerance", "choice", "reason"),
    [
        (SLOW_FLOATS, (0.01, 0.001), 0.01, "plain", "3.00x as fast as floats"),
        (SLOW_FLOATS, (0.0101, 0.001), 0.01, "modulated", "1.50x as fast as floats"),
        (SLOW_FLOATS, (0.5, 0.1), 0.01, "float", "no integers are exact enough"),
        (SLOW_FLOATS, (math.nan, math.nan), 0.01, "float", "no integers are exact enough"),
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
        (None, {"tolerance": 0}, "autotune: expected a relative error above 0 as tolerance, got 0"),
        (presets.plain(), {}, "autotune: expected a config with modulation, got None"),
        (ModiffConfig(overrides=(("body", LayerConfig()),)), {}, "autotune: expected a config without overrides"),
        (presets.modulated(8, None), {}, "autotune: expected 2 to 8 activation bits, got None"),
    ],
)
def test_what_cannot_be_tuned_is_refused(config, words, message):
    with pytest.raises(ConfigError, match=message):
        run_autotune(toy(), config, **words)
    with pytest.raises(CalibrationError, match="autotune: expected two steps or more of a layer"):
        choose_modes([model := toy()], lambda: sample(model, steps=1), presets.w8a8())
    with pytest.raises(StateError, match="autotune: expected a plain model, got Toy with modulated layers"):
        run_autotune(applied())
