"""Packing changes no output bit, takes the bytes that it promises, and cannot be undone quietly."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import modiff
from modiff import ConfigError, LayerConfig, ModiffConfig, StateError, WeightConfig, presets
from tests.helpers import assert_same_bits
from tests.model.toys import TAKEN, sample, toy, toy_unet
from tests.recipes import quantized_anchors


def outputs_of(model: nn.Module) -> list[torch.Tensor]:
    with modiff.trajectory(model):
        return sample(model)


def assert_equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("config", [presets.w8a8(), presets.tuned(4, 4), presets.uncompensated(2, 4)])
@pytest.mark.parametrize("make", [toy, toy_unet])
def test_outputs_stay_the_same_bits_where_anchors_are_quantized(make, config):
    model = make()
    modiff.apply(model, quantized_anchors(config))
    expected = outputs_of(model)
    modiff.pack(model)
    modiff.pack(model)
    assert_equal(outputs_of(model), expected)
    assert_equal(outputs_of(copy.deepcopy(model)), expected)


def test_every_taken_layer_is_integers_and_every_other_one_is_not():
    model = toy()
    modiff.apply(model, presets.w4a8())
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
        assert layer.weight.nbytes + layer.weight_scale.nbytes == expected
        assert expected / shape.numel() <= most


def test_there_is_no_way_back_and_it_is_said():
    model = toy()
    modiff.apply(model, presets.w8a4())
    modiff.pack(model)
    expected = outputs_of(model)
    with pytest.raises(StateError, match="remove: expected float weights to put back, got Toy with packed ones"):
        modiff.remove(model)
    with pytest.raises(StateError, match="apply: expected a plain model"):
        modiff.apply(model, presets.w8a4())
    assert_equal(outputs_of(model), expected)


def test_a_running_trajectory_is_refused():
    model = toy()
    modiff.apply(model)
    with modiff.trajectory(model), pytest.raises(StateError, match="pack: expected no running trajectory of Toy"):
        modiff.pack(model)
    assert not any(layer.packed for layer in model.modules() if hasattr(layer, "packed"))


def break_nan(model: nn.Module) -> None:
    model.attention.to_v.weight.data[1, 2] = float("nan")


def break_meta(model: nn.Module) -> None:
    model.attention.to_v.to(device="meta")


def break_learned(model: nn.Module) -> None:
    layer = model.attention.to_v
    layer.quantized_weight.fix(layer.quantized_weight.codes(layer.weight))
    layer.weight.data.mul_(2)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (break_nan, ConfigError, "attention.to_v.weight: expected finite numbers"),
        (break_meta, StateError, "attention.to_v: expected a weight in memory, got one on the meta device"),
        (break_learned, StateError, "attention.to_v.weight: expected the weight whose codes were fixed"),
    ],
)
def test_a_layer_that_cannot_be_packed_leaves_all_of_them_floats(damage, error, message):
    model = toy()
    modiff.apply(model, presets.w4a8())
    damage(model)
    with pytest.raises(error, match=message):
        modiff.pack(model)
    assert all(p.is_floating_point() for p in model.parameters())
    modiff.remove(model)


# ----------------------------------------------------------------------------------------------------- anchor codes


def test_anchor_codes_cost_a_byte_a_weight_and_leave_outputs_almost_as_they_were():
    errors, sizes = [], []
    for anchor_weights in ("quantized", "int8"):
        model = toy_unet()
        modiff.apply(model, presets.w4a8())
        exact = outputs_of(model)[0]
        weights = sum(e.weights for e in modiff.pack(model, anchor_weights=anchor_weights).taken)
        errors.append(float((outputs_of(model)[0] - exact).norm() / exact.norm()))
        sizes.append(sum(t.nbytes for t in [*model.parameters(), *model.buffers()]))
    assert errors[1] < 0.03 * errors[0]
    assert weights < sizes[1] - sizes[0] < 1.2 * weights  # and a scale for each output channel


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (presets.published(4, 8), ConfigError, "pack.anchor_weights: expected 'quantized' for Toy, got 'int8'"),
        (presets.plain(4, 8), ConfigError, "pack.anchor_weights: expected 'quantized' for Toy, got 'int8'"),
    ],
)
def test_anchor_codes_that_nothing_would_read_are_refused(config, error, message):
    model = toy()
    modiff.apply(model, config)
    with pytest.raises(error, match=message):
        modiff.pack(model, anchor_weights="int8")
    modiff.remove(model)


def test_anchor_codes_are_not_made_of_floats_that_are_gone():
    model = toy()
    modiff.apply(model, presets.w4a8())
    with pytest.raises(ConfigError, match=r"pack.anchor_weights: expected 'quantized' or 'int8', got 'exact'"):
        modiff.pack(model, anchor_weights="exact")
    modiff.pack(model)
    with pytest.raises(StateError, match="body: expected a float weight, got a packed one without anchor codes"):
        modiff.pack(model, anchor_weights="int8")
