"""What a checkpoint says of itself: JSON in and out, and one line for whatever else config.json may hold."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import modiff
from modiff import FormatError, LayerConfig, WeightConfig, presets
from modiff.checkpoint.layout import Layer, Layout
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


def with_value(*path: str | int, value: object) -> dict[str, object]:
    values = copy.deepcopy(SMALL.to_dict())
    at = values
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, "expected an object quantization_config, got NoneType"),
        (with_value("quant_method", value="bitsandbytes"), "expected quant_method 'modiff', got 'bitsandbytes'"),
        (with_value("version", value=2), "expected format version 1, got 2 written by 'modiff .*Quantize the mod"),
        (with_value("version", value=True), "expected format version 1, got True"),
        (
            {key: value for key, value in SMALL.to_dict().items() if key != "config"},
            "expected the field, got no config",
        ),
        (with_value("config", value=3), "expected the settings of modiff, got: ModiffConfig: expected an object"),
        (with_value("config", "min_weights", value="many"), "expected the settings of modiff, got: ModiffConfig.min"),
        (with_value("layer_configs", value=None), "expected the settings of modiff, got: LayerConfig"),
        (with_value("layers", value=[]), "expected an object layers, got list"),
        (with_value("layers", "a", value=0), r"expected an object layers\.a, got int"),
        (with_value("layers", "a", "config", value=2), "expected the number of one of 2 layer configs for a, got 2"),
        (with_value("layers", "a", "config", value=True), ".*layer configs for a, got True"),
        (with_value("layers", "b", "split", value=2.5), "expected a channel to split b at, got 2.5"),
        (with_value("config", "split_shortcuts", value="off"), "expected layers that are not split, .* got b split"),
        (with_value("scales", value=3), "expected an object scales, got int"),
        (with_value("largest_step", value=-1), "expected a difference of timesteps as largest_step, got -1"),
        (with_value("scales", "a", value=[1]), r"expected names of scales for a, got \[1\]"),
    ],
)
def test_a_damaged_layout_gets_one_line(values, message):
    with pytest.raises(FormatError, match=f"^here: {message}") as caught:
        Layout.from_dict("here", values)
    assert "\n" not in str(caught.value)
