"""Configs: JSON round trips of everything valid, and one clear line for everything that is not."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given, settings

from modiff import (
    AttentionConfig,
    ConfigError,
    LayerConfig,
    ModiffConfig,
    ModulationConfig,
    QuantizerConfig,
    WeightConfig,
    presets,
)
from tests.strategies import layer_configs, model_configs


@given(config=model_configs())
@settings(max_examples=100)
def test_a_config_survives_json_and_plain_dictionaries(config):
    assert ModiffConfig.from_json(config.to_json()) == config
    assert ModiffConfig.from_dict(config.to_dict()) == config
    assert ModiffConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(ModiffConfig.from_json(config.to_json())) == hash(config)


@given(config=layer_configs())
def test_every_field_is_in_the_dictionary(config):
    assert set(config.to_dict()) == {f.name for f in dataclasses.fields(config)}
    assert set(config.to_dict()["activation"]) == {f.name for f in dataclasses.fields(QuantizerConfig)}


def test_missing_fields_take_their_defaults():
    assert ModiffConfig.from_json("{}") == ModiffConfig()
    assert LayerConfig.from_dict({"activation": {"bits": 4}}) == LayerConfig(activation=QuantizerConfig(bits=4))
    assert LayerConfig.from_dict({"modulation": None}).modulation is None


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantizerConfig().bits = 4  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        QuantizerConfig(4)  # type: ignore[misc]


def test_configs_written_before_attention_and_step_groups_mean_what_they_meant():
    old = {"layer": {"activation": {"bits": 4, "granularity": "auto", "symmetric": True, "dynamic": False, "clip": 1}}}
    config = ModiffConfig.from_dict(old)
    assert config.attention is None
    assert config.layer.activation == QuantizerConfig(bits=4, dynamic=False)
    assert (config.layer.activation.lowest, config.layer.activation.step_groups) == ("measured", 1)


def test_a_softmax_quantizer_may_have_16_bits_and_a_layer_may_not():
    softmax = QuantizerConfig(bits=16, symmetric=False, lowest="zero")
    assert AttentionConfig(softmax=softmax).softmax.bits == 16
    with pytest.raises(ConfigError, match=r"LayerConfig\.activation\.bits: expected None, 0 or 2 to 8, got 16"):
        LayerConfig(activation=softmax, modulation=None)


ZERO = {"symmetric": False, "lowest": "zero"}

WRONG = [
    (lambda: QuantizerConfig(lowest="zero"), r"QuantizerConfig\.lowest: expected 'measured' with symmetric=True"),
    (lambda: QuantizerConfig(lowest="one"), r"QuantizerConfig\.lowest: expected one of 'measured', 'zero'"),
    (
        lambda: QuantizerConfig(dynamic=False, step_groups=-1),
        r"QuantizerConfig\.step_groups: expected 0 or more groups, got -1",
    ),
    (lambda: QuantizerConfig(step_groups=0), r"QuantizerConfig\.step_groups: expected 1 with dynamic=True, got 0"),
    (
        lambda: LayerConfig(activation=QuantizerConfig(**ZERO)),
        r"LayerConfig\.activation\.lowest: expected 'measured' with modulation, got 'zero'",
    ),
    (
        lambda: AttentionConfig(operands=QuantizerConfig(bits=0)),
        r"AttentionConfig\.operands\.bits: expected None or bits to code with, got 0",
    ),
    (
        lambda: AttentionConfig(operands=QuantizerConfig(granularity="token")),
        r"AttentionConfig\.operands\.granularity: expected 'auto', 'tensor' or 'sample', got 'token'",
    ),
    (
        lambda: AttentionConfig(operands=QuantizerConfig(**ZERO)),
        r"AttentionConfig\.operands\.lowest: expected 'measured', got 'zero'",
    ),
    (
        lambda: AttentionConfig(softmax=QuantizerConfig()),
        r"AttentionConfig\.softmax\.lowest: expected 'zero', got 'measured'",
    ),
    (
        lambda: AttentionConfig(softmax=QuantizerConfig(granularity="input_channel", **ZERO)),
        r"AttentionConfig\.softmax\.granularity: expected 'auto', 'tensor', 'sample' or 'token'",
    ),
    (lambda: WeightConfig(bits=1), r"WeightConfig\.bits: expected None or 2 to 8, got 1\."),
    (lambda: WeightConfig(bits=0), r"WeightConfig\.bits: expected None or 2 to 8, got 0\."),
    (lambda: WeightConfig(bits=9), r"WeightConfig\.bits: expected None or 2 to 8, got 9\."),
    (lambda: WeightConfig(search="best"), r"WeightConfig\.search: expected one of 'minmax', 'mse', got 'best'\."),
    (
        lambda: QuantizerConfig(bits=1),
        r"QuantizerConfig\.bits: expected None, 0 or 2 to 8, got 1\. .* Use 2 bits or more",
    ),
    (lambda: QuantizerConfig(bits=16), r"QuantizerConfig\.bits: expected None, 0 or 2 to 8, got 16\."),
    (lambda: QuantizerConfig(bits=-4), r"QuantizerConfig\.bits: .* got -4\."),
    (lambda: QuantizerConfig(bits=4.0), r"QuantizerConfig\.bits: expected a whole number or None, got 4\.0\."),
    (lambda: QuantizerConfig(bits=True), r"QuantizerConfig\.bits: expected a whole number or None, got True\."),
    (lambda: QuantizerConfig(bits="4"), r"QuantizerConfig\.bits: expected a whole number or None, got '4'\."),
    (lambda: QuantizerConfig(clip=0.0), r"QuantizerConfig\.clip: expected a ratio in \(0, 1\], got 0\.0\."),
    (lambda: QuantizerConfig(clip=-0.5), r"QuantizerConfig\.clip: expected a ratio in \(0, 1\], got -0\.5\."),
    (lambda: QuantizerConfig(clip=1.5), r"QuantizerConfig\.clip: expected a ratio in \(0, 1\], got 1\.5\."),
    (lambda: QuantizerConfig(clip=float("nan")), r"QuantizerConfig\.clip: expected a ratio in \(0, 1\], got nan\."),
    (lambda: QuantizerConfig(clip="half"), r"QuantizerConfig\.clip: expected a number, got 'half'\."),
    (lambda: QuantizerConfig(symmetric="yes"), r"QuantizerConfig\.symmetric: expected True or False, got 'yes'\."),
    (
        lambda: QuantizerConfig(granularity="channel"),
        r"QuantizerConfig\.granularity: expected one of 'auto', .* got 'channel'\.",
    ),
    (
        lambda: QuantizerConfig(granularity="token", dynamic=False),
        r"QuantizerConfig\.granularity: expected 'tensor', .* got 'token'\.",
    ),
    (
        lambda: QuantizerConfig(granularity="sample", dynamic=False),
        r"QuantizerConfig\.granularity: expected 'tensor', .* got 'sample'\.",
    ),
    (
        lambda: ModulationConfig(predictor="cubic"),
        r"ModulationConfig\.predictor: expected one of 'hold', 'linear'.*, got 'cubic'\.",
    ),
    (lambda: ModulationConfig(gain=0.0), r"ModulationConfig\.gain: expected a gain in \(0, 1\], got 0\.0\."),
    (
        lambda: ModulationConfig(gain=1.1),
        r"ModulationConfig\.gain: expected a gain in \(0, 1\], got 1\.1\. Above 1 the loop diverges",
    ),
    (lambda: ModulationConfig(rounds=0), r"ModulationConfig\.rounds: expected 1 to 16 rounds, got 0\."),
    (lambda: ModulationConfig(rounds=17), r"ModulationConfig\.rounds: expected 1 to 16 rounds, got 17\."),
    (lambda: ModulationConfig(rounds=2.5), r"ModulationConfig\.rounds: expected a whole number, got 2\.5\."),
    (
        lambda: ModulationConfig(reanchor_every=-1),
        r"ModulationConfig\.reanchor_every: expected 0 or more steps, got -1\.",
    ),
    (
        lambda: ModulationConfig(state_dtype="int8"),
        r"ModulationConfig\.state_dtype: expected one of 'float32', .* got 'int8'\.",
    ),
    (lambda: ModulationConfig(first_step="skip"), r"ModulationConfig\.first_step: expected one of .* got 'skip'\."),
    (
        lambda: ModulationConfig(predictor="linear", error_compensation="none"),
        r"ModulationConfig\.predictor: expected 'hold' when error_compensation is 'none', got 'linear'\.",
    ),
    (
        lambda: LayerConfig(rotation="fourier"),
        r"LayerConfig\.rotation: expected one of 'none', 'hadamard', got 'fourier'\.",
    ),
    (
        lambda: LayerConfig(rotation_block=48),
        r"LayerConfig\.rotation_block: expected a power of two from 2 up, got 48\.",
    ),
    (lambda: LayerConfig(rotation_block=1), r"LayerConfig\.rotation_block: expected a power of two from 2 up, got 1\."),
    (
        lambda: LayerConfig(activation={"bits": 4}),
        r"LayerConfig\.activation: expected a QuantizerConfig, got \{'bits': 4\}\.",
    ),
    (lambda: LayerConfig(weight=None), r"LayerConfig\.weight: expected a WeightConfig, got None\."),
    (
        lambda: LayerConfig(activation=QuantizerConfig(bits=0), modulation=None),
        r"LayerConfig\.activation\.bits: expected 2 to 8 bits without modulation, got 0\.",
    ),
    (
        lambda: LayerConfig(activation=QuantizerConfig(bits=0), modulation=ModulationConfig(first_step="coded")),
        r"LayerConfig\.modulation\.first_step: expected 'full_precision' at 0 bits, got 'coded'\.",
    ),
    (lambda: ModiffConfig(include="down.*"), r"ModiffConfig\.include: expected a tuple of a string, got 'down\.\*'\."),
    (
        lambda: ModiffConfig(exclude=("a", 3)),
        r"\.exclude: expected a tuple of a string or None, got \('a', 3\)\.",
    ),
    (
        lambda: ModiffConfig(overrides=(("a",),)),
        r"ModiffConfig\.overrides: expected a tuple of \(a string, a LayerConfig\), got",
    ),
    (
        lambda: ModiffConfig(first_last="skip"),
        r"ModiffConfig\.first_last: expected one of 'full_precision', 'quantize', got 'skip'\.",
    ),
    (
        lambda: ModiffConfig(share_residuals=True),
        r"ModiffConfig\.share_residuals: expected one of 'auto', 'off', got True\.",
    ),
    (
        lambda: ModiffConfig.from_json('{"layers": {}}'),
        r"ModiffConfig: expected a known field, got 'layers'\. Known fields: layer, include",
    ),
    (
        lambda: ModiffConfig.from_json('{"layer": {"activation": {"bit": 4}}}'),
        r"QuantizerConfig: expected a known field, got 'bit'\.",
    ),
    (lambda: ModiffConfig.from_json('{"layer": {"activation": {"bits": 1}}}'), r"QuantizerConfig\.bits: .* got 1\."),
    (lambda: ModiffConfig.from_json('{"overrides": [["a"]]}'), r"ModiffConfig\.overrides: expected a tuple of"),
    (lambda: ModiffConfig.from_json("{"), r"ModiffConfig: expected JSON, got text that stops at .* Check the file\."),
    (lambda: ModiffConfig.from_json("[" * 100_000), r"ModiffConfig: expected JSON, got text that stops at maximum rec"),
    (lambda: ModiffConfig.from_json("[1]"), r"ModiffConfig: expected an object with named fields, got \[1\]\."),
    (
        lambda: ModiffConfig.from_json('{"layer": null}'),
        r"LayerConfig: expected an object with named fields, got None\.",
    ),
    (
        lambda: LayerConfig.from_dict({"modulation": 3}),
        r"ModulationConfig: expected an object with named fields, got 3\.",
    ),
]


@pytest.mark.parametrize(("make", "message"), WRONG, ids=[message[:60] for _, message in WRONG])
def test_a_wrong_setting_is_one_clear_line(make, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("bits", "clip", "stable"),
    [
        (2, 1.0, False),
        (2, 0.45, False),
        (3, 1.0, False),
        (3, 0.6, True),
        (4, 1.0, True),
        (8, 1.0, True),
        (0, 1.0, True),
        (None, 1.0, True),
    ],
)
def test_the_linear_predictor_is_allowed_exactly_where_its_loop_is_stable(bits, clip, stable):
    def make() -> LayerConfig:
        return LayerConfig(
            activation=QuantizerConfig(bits=bits, clip=clip), modulation=ModulationConfig(predictor="linear")
        )

    if stable:
        assert make().modulation.predictor == "linear"
    else:
        with pytest.raises(
            ConfigError, match=rf"predictor: expected 'hold' at {bits} bits with clip {clip}, got 'linear'"
        ):
            make()


def test_every_preset_survives_json():
    for config in (presets.w8a8(), presets.w8a4(), presets.tuned(4, 2), presets.plain(), presets.uncompensated()):
        assert ModiffConfig.from_json(config.to_json()) == config


def test_on_integers_reaches_the_overrides_and_changes_nothing_else():
    config = ModiffConfig(overrides=(("*.conv1", LayerConfig(modulation=None)),), exclude=("a",))
    found = config.on_integers()
    assert [layer.execution for layer in (found.layer, found.overrides[0][1])] == ["integer", "integer"]
    back = ModiffConfig.from_dict(json.loads(found.to_json().replace('"integer"', '"simulated"')))
    assert back == config
