"""What a checkpoint says of itself: JSON in and out, and one line for whatever else config.json may hold."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import modiff
from modiff import FormatError, LayerConfig, WeightConfig, presets
from modiff.checkpoint.layout import Layer, Layout
from tests.model.toys import TAKEN, toy
from tests.strategies import layer_configs, model_configs

SMALL = Layout(
    presets.w4a8(),
    {"a": Layer(LayerConfig()), "b": Layer(LayerConfig(weight=WeightConfig(bits=4)), 3), "c": Layer(LayerConfig())},
    {"a": ("static.0.scale",)},
)


def reread(layout: Layout) -> Layout:
    return Layout.from_dict("here", json.loads(json.dumps(layout.to_dict())))


@settings(max_examples=15)
@given(model_configs(), st.lists(layer_configs(), max_size=3), st.integers(1, 9))
def test_any_layout_comes_back_from_json(config, layers, split):
    cut = config.split_shortcuts == "auto"
    named = {f"layer{i}": Layer(layer, split if i % 2 and cut else None) for i, layer in enumerate(layers * 2)}
    layout = Layout(config, named, {name: ("x", "y") for name in named})
    assert reread(layout) == layout


def test_equal_layer_configs_are_written_once():
    values = SMALL.to_dict()
    assert len(values["layer_configs"]) == 2
    assert [values["layers"][name] for name in "abc"] == [{"config": 0}, {"config": 1, "split": 3}, {"config": 0}]
    assert (values["quant_method"], values["version"]) == ("modiff", 1)
    assert values["written_by"] == f"modiff {modiff.__version__}"


def test_a_model_s_layout_names_what_was_taken_with_the_config_it_got():
    model, one = toy(), LayerConfig(weight=WeightConfig(bits=3))
    config = dataclasses.replace(presets.w4a8(), overrides=(("body", one),))
    modiff.apply(model, config)
    layout = Layout.of(model)
    assert layout.config == config
    assert set(layout.layers) == set(TAKEN)
    assert layout.layers["body"] == Layer(one)
    assert layout.scales == {}
    assert reread(layout) == layout


def with_value(*path: str | int, value: object) -> dict[str, object]:
    values = copy.deepcopy(SMALL.to_dict())
    at = values
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return values


def without(name: str) -> dict[str, object]:
    return {key: value for key, value in SMALL.to_dict().items() if key != name}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, "expected an object quantization_config, got NoneType"),
        ([1], "expected an object quantization_config, got list"),
        ({}, "expected quant_method 'modiff', got None"),
        (with_value("quant_method", value="bitsandbytes"), "expected quant_method 'modiff', got 'bitsandbytes'"),
        (with_value("version", value=2), "expected format version 1, got 2 written by 'modiff .*Quantize the mod"),
        (with_value("version", value="1"), "expected format version 1, got '1'"),
        (with_value("version", value=True), "expected format version 1, got True"),
        (without("version"), "expected format version 1, got None"),
        (without("config"), "expected the field, got no config"),
        (without("layers"), "expected the field, got no layers"),
        (without("scales"), "expected the field, got no scales"),
        (with_value("config", value=3), "expected the settings of modiff, got: ModiffConfig: expected an object"),
        (with_value("config", "min_weights", value="many"), "expected the settings of modiff, got: ModiffConfig.min"),
        (with_value("config", "unheard_of", value=1), "expected the settings of modiff, got: .*'unheard_of'"),
        (with_value("layer_configs", value=None), "expected the settings of modiff, got: LayerConfig"),
        (with_value("layer_configs", 0, "weight", "bits", value=10**30), "expected the settings of modiff, got: Wei"),
        (with_value("layers", value=[]), "expected an object layers, got list"),
        (with_value("layers", "a", value=0), r"expected an object layers\.a, got int"),
        (with_value("layers", "a", "config", value=2), "expected the number of one of 2 layer configs for a, got 2"),
        (with_value("layers", "a", "config", value=-1), ".*layer configs for a, got -1"),
        (with_value("layers", "a", "config", value=True), ".*layer configs for a, got True"),
        (with_value("layers", "b", "split", value="3"), "expected a channel to split b at, got 3"),
        (with_value("layers", "b", "split", value=2.5), "expected a channel to split b at, got 2.5"),
        (with_value("config", "split_shortcuts", value="off"), "expected layers that are not split, .* got b split"),
        (with_value("scales", value=3), "expected an object scales, got int"),
        (with_value("scales", "a", value="static"), "expected names of scales for a, got static"),
        (with_value("scales", "a", value=[1]), r"expected names of scales for a, got \[1\]"),
    ],
)
def test_a_damaged_layout_gets_one_line(values, message):
    with pytest.raises(FormatError, match=f"^here: {message}") as caught:
        Layout.from_dict("here", values)
    assert "\n" not in str(caught.value)


def test_settings_of_the_first_edition_anchor_with_quantized_weights_all_layers_at_once():
    values = Layout(presets.w4a8(), {"a": Layer(LayerConfig())}).to_dict()
    for loop in (values["config"]["layer"]["modulation"], values["layer_configs"][0]["modulation"]):
        del loop["anchor_weights"], loop["stagger"]
    layout = Layout.from_dict("here", values)
    for layer in (layout.config.layer, layout.layers["a"].config):
        assert (layer.modulation.anchor_weights, layer.modulation.stagger) == ("quantized", False)
