"""Autotune: each layer gets the fastest mode that is exact enough, from times that are given or measured."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from torch import nn

import modiff
from modiff import CalibrationError, ConfigError, LayerConfig, ModiffConfig, QuantizerConfig, StateError, presets
from modiff.errors import FormatError
from modiff.model.autotune import MARGIN, Profile, Seconds, choose, choose_modes, measure_layer, signature
from modiff.model.roofline import Reached
from tests.model.toys import TAKEN, sample, toy

SLOW_FLOATS = {"float": 3.0, "plain": 1.0, "modulated": 2.0}
PEAKS = Reached(1e10, 1e11, 4e11)


@pytest.mark.parametrize(
    ("seconds", "errors", "tolerance", "choice", "reason"),
    [
        (SLOW_FLOATS, (0.01, 0.001), 0.01, "plain", "3.00x as fast as floats"),
        (SLOW_FLOATS, (0.0101, 0.001), 0.01, "modulated", "1.50x as fast as floats"),
        (SLOW_FLOATS, (0.5, 0.1), 0.01, "float", "no integers are exact enough"),
        (SLOW_FLOATS, (math.nan, math.nan), 0.01, "float", "no integers are exact enough"),
        ({"float": 1.0, "plain": 1.0, "modulated": 2.0}, (0.0, 0.0), 0.01, "float", "plain takes 1.00x the time"),
        ({"float": 1.0, "plain": MARGIN, "modulated": 2.0}, (0.0, 0.0), 0.01, "plain", "1.03x"),
        ({"float": 1.0, "plain": 2.0, "modulated": 0.5}, (0.0, 0.0), 0.01, "modulated", "2.00x"),
    ],
)
def test_the_fastest_mode_within_the_tolerance_wins_and_floats_where_it_does_not_pay(
    seconds, errors, tolerance, choice, reason
):
    found, why = choose(seconds, errors, tolerance)
    assert found == choice
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
    words.setdefault("profile", Profile(PEAKS))
    return choose_modes([model], lambda: sample(model), config or presets.w8a8(), **words)


def test_the_config_does_what_the_rows_say(times):
    model = toy()
    found = run_autotune(model, tolerance=0.5)
    assert [row.name for row in found.rows] == list(TAKEN)
    assert {row.name: row.choice for row in found.rows} == {"body": "plain"} | dict.fromkeys(TAKEN[1:], "float")
    report = modiff.apply(model, found.config)
    assert [entry.name for entry in report.taken] == ["body"]
    assert report.taken[0].config == LayerConfig(modulation=None, execution="integer")
    assert torch.stack(sample(model)).isfinite().all()


def test_a_tighter_tolerance_turns_plain_layers_into_modulated_ones(times):
    model = toy()
    (body, *_) = run_autotune(model, tolerance=0.5).rows
    plain, modulated = body.errors
    assert modulated < plain
    found = run_autotune(model, tolerance=(plain + modulated) / 2)
    assert found.rows[0].choice == "modulated"
    assert found.state_bytes == found.rows[0].state_bytes == 4 * (2 * 16 * 4 * 4 + 2 * 16 * 4 * 4)
    modiff.apply(model, found.config)
    assert model.body.inputs is not None
    assert run_autotune(toy(), tolerance=modulated / 2).rows[0].choice == "float"


def test_the_same_profile_gives_the_same_choice_and_measures_nothing_again(times):
    profile = Profile(PEAKS)
    first = run_autotune(toy(), tolerance=0.5, profile=profile)
    assert len(times) == len(set(times)) == len(profile.layers) == 2  # all linear layers are alike
    again = run_autotune(toy(), tolerance=0.5, profile=Profile.from_dict(json.loads(json.dumps(profile.to_dict()))))
    assert again == first
    assert len(times) == 2


def test_static_scales_are_judged_by_measured_ones_and_stay_in_the_config(times):
    config = ModiffConfig(layer=LayerConfig(activation=QuantizerConfig(dynamic=False)))
    found = run_autotune(toy(), config, tolerance=0.5)
    assert found.rows[0].choice == "plain"
    assert not found.config.layer.activation.dynamic


def test_the_seconds_of_an_evaluation_are_the_sum_over_its_calls(times):
    found = run_autotune(toy(), tolerance=0.5)
    assert [row.calls for row in found.rows] == [1.0] * 5
    assert (found.seconds("float"), found.seconds("plain"), found.seconds()) == (7.0, 9.0, 5.0)
    text = str(found)
    assert "4 float, 1 plain, 0 modulated; layers of one evaluation: 5000.0 ms as chosen, all float 7000.0" in text
    assert json.loads(json.dumps(found.to_dict()))["layers"][0]["choice"] == "plain"


def test_the_model_is_left_as_it_was(times):
    model = toy()
    before = dict(model.__dict__)
    run_autotune(model)
    assert model.__dict__ == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_layer_is_timed_in_all_three_modes_and_each_signature_stands_for_one_kind():
    layer, x = nn.Conv2d(8, 8, 3, padding=1), torch.randn(2, 8, 6, 6)
    found = measure_layer(layer, x, LayerConfig())
    assert set(found) == {"float", "plain", "modulated"}
    assert all(0 < seconds < 60 for seconds in found.values())
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


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "KeyError"),
        ({"peaks": None, "layers": {"a": {"float": 1.0}}}, "KeyError"),
        ({"peaks": 3, "layers": {}}, ""),
    ],
)
def test_a_profile_that_is_none_is_refused(values, message):
    with pytest.raises(FormatError, match=f"profile: expected peaks and times of layers.*{message}.*Delete it"):
        Profile.from_dict(values)


def test_what_cannot_be_gated_is_refused():
    model = toy()
    with pytest.raises(ConfigError, match=r"autotune.tolerance: expected a relative error above 0, got 0"):
        run_autotune(model, tolerance=0)
    with pytest.raises(ConfigError, match="autotune: expected a config with modulation, got none"):
        run_autotune(model, presets.plain())
    with pytest.raises(ConfigError, match="autotune: expected a config without overrides"):
        run_autotune(model, dataclasses.replace(presets.w8a8(), overrides=(("body", LayerConfig()),)))
    with pytest.raises(ConfigError, match="autotune: expected 2 to 8 activation bits, got None"):
        run_autotune(model, presets.modulated(8, None))
    with pytest.raises(CalibrationError, match="autotune: expected a trajectory of two steps or more"):
        choose_modes([model], lambda: sample(model, steps=1), presets.w8a8())
    modiff.apply(model, presets.w8a8())
    with pytest.raises(StateError, match="autotune: expected a plain model, got one with modulated layers"):
        run_autotune(model)
