"""Packing changes no output bit, and packs all layers or none."""

import copy

import pytest
import torch
from torch import nn

import modiff
from modiff import ConfigError, StateError, presets
from tests.model.toys import applied, assert_equal, generate, toy, toy_unet
from tests.recipes import quantized_anchors


@pytest.mark.parametrize("config", [presets.w8a8(), presets.tuned(4, 4), presets.uncompensated(2, 4)])
@pytest.mark.parametrize("make", [toy, toy_unet])
def test_outputs_stay_the_same_bits_where_anchors_are_quantized(make, config):
    model = applied(quantized_anchors(config), make)
    expected = generate(model)
    modiff.pack(model)
    modiff.pack(model)
    assert_equal(generate(model), expected)
    assert_equal(generate(copy.deepcopy(model)), expected)


def change_learned(layer: nn.Module) -> None:
    layer.quantized_weight.fix(layer.quantized_weight.codes(layer.weight))
    layer.weight.data.mul_(2)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda layer: layer.weight.data.fill_(torch.nan), ConfigError, "to_v.weight: expected finite numbers"),
        (lambda layer: layer.to(device="meta"), StateError, "to_v: expected a weight in memory, got one on the meta"),
        (change_learned, StateError, "to_v.weight: expected the weight whose codes were fixed"),
        (lambda layer: layer.clock.start(), StateError, "pack: expected no running trajectory of Toy"),
    ],
)
def test_a_layer_that_cannot_be_packed_leaves_all_of_them_floats(damage, error, message):
    model = applied(presets.w4a8())
    damage(model.attention.to_v)
    with pytest.raises(error, match=message):
        modiff.pack(model)
    assert all(p.is_floating_point() for p in model.parameters())
    modiff.remove(model)


@pytest.mark.parametrize(
    ("config", "kept"), [(presets.published(4, 8), "int8"), (presets.plain(4, 8), "int8"), (presets.w4a8(), "exact")]
)
def test_anchor_codes_that_nothing_would_read_are_refused(config, kept):
    model = applied(config)
    with pytest.raises(ConfigError, match=f"pack.anchor_weights: expected 'quantized'.*, got '{kept}'"):
        modiff.pack(model, anchor_weights=kept)
    modiff.remove(model)
