"""Packing changes no output bit, takes the bytes that it promises, and cannot be undone quietly."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import modiff
from modiff import ConfigError, LayerConfig, ModiffConfig, StateError, WeightConfig, presets
from tests.model.toys import TAKEN, applied, assert_equal, generate, toy, toy_unet
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


def test_every_taken_layer_is_integers_and_every_other_one_is_not():
    model = applied(presets.w4a8())
    modiff.pack(model)
    packed = {name for name, parameter in model.named_parameters() if not parameter.is_floating_point()}
    assert packed == {f"{name}.weight" for name in TAKEN}
    assert {name for name, _ in model.named_buffers()} == {f"{name}.weight_scale" for name in TAKEN}
    assert not any(model.get_parameter(name).requires_grad for name in packed)


@pytest.mark.parametrize(("bits", "most"), [(4, 0.6), (8, 1.1)])
def test_bytes_per_weight_are_those_of_the_formula(bits, most):
    """Half a byte or one for each weight, and four for each output channel: under 0.6 from 40 weights a channel on."""
    model = nn.Sequential(nn.Linear(64, 96), nn.Conv1d(96, 48, 3), nn.Conv2d(48, 32, 3, groups=2), nn.Linear(65, 64))
    modiff.apply(model, ModiffConfig(layer=LayerConfig(weight=WeightConfig(bits=bits)), first_last="quantize"))
    sizes = [layer.weight.shape for layer in model]
    modiff.pack(model)
    for layer, shape in zip(model, sizes, strict=True):
        row = shape[1:].numel()
        expected = shape[0] * (-(-row // 2) if bits == 4 else row) + 4 * shape[0]
        assert layer.operator.weight.nbytes + layer.weight_scale.nbytes == expected
        assert expected / shape.numel() <= most


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


def test_there_is_no_way_back_to_floats_and_it_is_said():
    model = applied(presets.w4a8())
    modiff.pack(model)
    expected = generate(model)
    with pytest.raises(StateError, match="remove: expected float weights to put back, got Toy with packed ones"):
        modiff.remove(model)
    with pytest.raises(StateError, match="body: expected a float weight, got a packed one without anchor codes"):
        modiff.pack(model, anchor_weights="int8")
    assert_equal(generate(model), expected)


def test_anchor_codes_cost_a_byte_a_weight_and_leave_outputs_almost_as_they_were():
    errors, sizes = [], []
    for anchor_weights in ("quantized", "int8"):
        model = applied(presets.w4a8(), toy_unet)
        exact = generate(model)[0]
        weights = sum(e.weights for e in modiff.pack(model, anchor_weights=anchor_weights).taken)
        errors.append(float((generate(model)[0] - exact).norm() / exact.norm()))
        sizes.append(sum(t.nbytes for t in [*model.parameters(), *model.buffers()]))
    assert errors[1] < 0.03 * errors[0]
    assert weights < sizes[1] - sizes[0] < 1.2 * weights  # and a scale for each output channel


@pytest.mark.parametrize(
    ("config", "kept"), [(presets.published(4, 8), "int8"), (presets.plain(4, 8), "int8"), (presets.w4a8(), "exact")]
)
def test_anchor_codes_that_nothing_would_read_are_refused(config, kept):
    model = applied(config)
    with pytest.raises(ConfigError, match=f"pack.anchor_weights: expected 'quantized'.*, got '{kept}'"):
        modiff.pack(model, anchor_weights=kept)
    modiff.remove(model)
