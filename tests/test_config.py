"""Configs: JSON round trips of everything valid, and one clear line for everything that is not."""

from __future__ import annotations

import dataclasses
import re

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
)
from tests.strategies import model_configs


@given(config=model_configs())
@settings(max_examples=40)
def test_a_config_survives_json_and_plain_dictionaries_with_every_field(config):
    assert ModiffConfig.from_json(config.to_json()) == config
    assert hash(ModiffConfig.from_json(config.to_json())) == hash(config)
    assert set(config.to_dict()["layer"]) == {f.name for f in dataclasses.fields(config.layer)}


def test_missing_fields_take_their_defaults():
    assert ModiffConfig.from_json("{}") == ModiffConfig()
    assert LayerConfig.from_dict({"modulation": None}).modulation is None


ZERO = QuantizerConfig(symmetric=False, lowest="zero")
WIDE = dataclasses.replace(ZERO, bits=16)
INPUTS = dataclasses.replace(ZERO, granularity="input_channel")
CODED, LINEAR = ModulationConfig(first_step="coded"), ModulationConfig(predictor="linear")
TWO, THREE = QuantizerConfig(bits=2, clip=0.45), QuantizerConfig(bits=3)
SKIP = QuantizerConfig(bits=0)
VALUES: dict[type, dict[str, tuple[object, ...]]] = {
    WeightConfig: {"bits": (0, 1, 9), "search": ("best",)},
    QuantizerConfig: {"bits": (-4, 1, 9, 16, 4.0, True, "4"), "clip": (-0.5, 0.0, 1.5, float("nan"), "half"),
                      "symmetric": ("yes",), "granularity": ("channel",), "lowest": ("one", "zero"),
                      "step_groups": (-1, 0)},
    ModulationConfig: {"predictor": ("cubic",), "gain": (0.0, 1.1), "rounds": (0, 17, 2.5), "reanchor_every": (-1,),
                       "state_dtype": ("int8",), "first_step": ("skip",)},
    LayerConfig: {"rotation": ("fourier",), "rotation_block": (1, 48), "activation": ({"bits": 4},),
                  "weight": (None,)},
    ModiffConfig: {"include": ("down.*",), "exclude": (("a", 3),), "overrides": ((("a",),),),
                   "first_last": ("skip",), "share_residuals": (True,), "min_weights": (-5, 0.5, True)},
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [(kind, field, value) for kind, fields in VALUES.items() for field, values in fields.items() for value in values],
)
def test_a_wrong_value_is_one_clear_line_that_names_it(kind, field, value):
    got = re.escape(repr(value))
    with pytest.raises(ConfigError, match=rf"^{kind.__name__}\.{field}: expected [^\n]+, got {got}\. \S[^\n]+\.$"):
        kind(**{field: value})


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (QuantizerConfig, {"granularity": "token", "dynamic": False}, "granularity: expected 'tensor',"),
        (QuantizerConfig, {"step_groups": -1, "dynamic": False}, "step_groups: expected 0 or more groups, got -1"),
        (ModulationConfig, {"predictor": "linear", "error_compensation": "none"}, "predictor: expected 'hold' when"),
        (LayerConfig, {"activation": ZERO}, "activation.lowest: expected 'measured' with modulation, got 'zero'"),
        (
            LayerConfig,
            {"activation": TWO, "modulation": LINEAR},
            "modulation.predictor: expected 'hold' at 2 bits with",
        ),
        (LayerConfig, {"activation": THREE, "modulation": LINEAR}, "modulation.predictor: expected 'hold' at 3 bits w"),
        (LayerConfig, {"activation": SKIP, "modulation": None}, "activation.bits: expected 2 to 8 bits without modul"),
        (LayerConfig, {"activation": SKIP, "modulation": CODED}, "modulation.first_step: expected 'full_precision' at"),
        (LayerConfig, {"activation": WIDE, "modulation": None}, "activation.bits: expected None, 0 or 2 to 8, got 16"),
        (AttentionConfig, {"operands": SKIP}, "operands.bits: expected None or bits to code with"),
        (AttentionConfig, {"operands": QuantizerConfig(granularity="token")}, "operands.granularity: expected 'auto',"),
        (AttentionConfig, {"operands": ZERO}, "operands.lowest: expected 'measured', got 'zero'"),
        (AttentionConfig, {"softmax": QuantizerConfig()}, "softmax.lowest: expected 'zero', got 'measured'"),
        (AttentionConfig, {"softmax": INPUTS}, "softmax.granularity: expected 'auto', 'tensor', 'sample' or 'token'"),
    ],
)
def test_settings_that_do_not_go_together_are_one_clear_line(kind, fields, message):
    with pytest.raises(ConfigError, match=rf"^{kind.__name__}\.{re.escape(message)}[^\n]*$"):
        kind(**fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"layers": {}}', "ModiffConfig: expected a known field, got 'layers'. Known fields: layer, include"),
        ('{"layer": {"activation": {"bit": 4}}}', "QuantizerConfig: expected a known field, got 'bit'."),
        ('{"layer": {"activation": {"bits": 1}}}', "QuantizerConfig.bits: expected None, 0 or 2 to 8, got 1."),
        ('{"overrides": [["a"]]}', "ModiffConfig.overrides: expected a tuple of"),
        ("{", "ModiffConfig: expected JSON, got text that stops at "),
        ("[" * 100_000, "ModiffConfig: expected JSON, got text that stops at maximum rec"),
        ("[1]", "ModiffConfig: expected an object with named fields, got [1]."),
        ('{"layer": null}', "LayerConfig: expected an object with named fields, got None."),
    ],
)
def test_wrong_json_is_one_clear_line(text, message):
    with pytest.raises(ConfigError, match=rf"^{re.escape(message)}[^\n]*$"):
        ModiffConfig.from_json(text)


def test_on_integers_reaches_the_overrides_and_changes_nothing_else():
    config = ModiffConfig(overrides=(("*.conv1", LayerConfig(modulation=None)),), exclude=("a",))
    integers = config.on_integers()
    assert [layer.execution for layer in (integers.layer, integers.overrides[0][1])] == ["integer", "integer"]
    assert ModiffConfig.from_json(integers.to_json().replace('"integer"', '"simulated"')) == config


@pytest.mark.parametrize(("exclude", "now"), [(None, ((), None)), (["a"], (("a",), ()))])
def test_a_config_written_when_exclude_replaced_the_defaults_keeps_its_meaning(exclude, now):
    values = ModiffConfig().to_dict() | {"exclude": exclude}
    del values["default_exclude"]
    config = ModiffConfig.from_dict(values)
    assert (config.exclude, config.default_exclude) == now
    assert ModiffConfig.from_dict(config.to_dict()) == config
