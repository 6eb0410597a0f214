"""Packed weights: every byte pattern, every layout, the same bits as before, and nothing that quietly changes them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from modiff import LayerConfig, ModulationConfig, QuantizerConfig, StateError, WeightConfig
from modiff.kernels.layout import weight_codes
from modiff.nn.packed import ERROR, pack_nibbles
from tests.helpers import assert_same_bits, assert_same_tensors, assert_within, drifting, relative_error
from tests.nn.building import same_bits
from tests.recipes import evaluate, play, quantized, randomised

LAYERS = {
    "linear": (lambda: nn.Linear(12, 5), (3, 12), None),
    "odd": (lambda: nn.Linear(7, 4, bias=False), (3, 7), None),
    "conv": (lambda: nn.Conv2d(6, 5, 3, padding=1), (2, 6, 4, 4), None),
    "groups": (lambda: nn.Conv1d(6, 4, 3, groups=2), (2, 6, 5), None),
    "split": (lambda: nn.Conv2d(12, 5, 1), (2, 12, 3, 3), 4),
}


def layer_of(kind: str, bits: int | None, anchor: str = "quantized", search: str = "minmax", **settings):
    make, shape, split = LAYERS[kind]
    weight, modulation = WeightConfig(bits=bits, search=search), ModulationConfig(anchor_weights=anchor)
    config = LayerConfig(weight=weight, activation=QuantizerConfig(bits=6), modulation=modulation, **settings)
    return quantized(randomised(make()), config, split=split, name="up"), drifting(0, shape, 4, 0.2, torch.float32)


def test_each_byte_holds_two_codes_the_first_in_its_low_half():
    every = torch.arange(256, dtype=torch.uint8)[None]
    codes = weight_codes(every, (1, 512))
    expected = [half - 16 if half > 7 else half for byte in range(256) for half in (byte % 16, byte // 16)]
    assert codes.dtype == torch.int8
    assert codes[0].tolist() == expected
    assert_same_bits(pack_nibbles(codes), every)


@pytest.mark.parametrize("rotation", ["none", "hadamard"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_packed_layer_computes_the_same_bits(kind, bits, rotation):
    layer, inputs = layer_of(kind, bits, search="mse", rotation=rotation)
    codes, before, stored = layer.quantized_weight.codes(layer.weight), play(layer, inputs), layer.packed_state()
    layer.pack()
    assert layer.packed
    for (ours, q), (theirs, expected) in zip(layer.quantized_weight.codes(layer.weight), codes, strict=True):
        same_bits([(ours, q.scale)], [(theirs, expected.scale)])
    same_bits(play(layer, inputs), before)
    layer.pack()
    same_bits([layer.packed_state().values()], [stored.values()])


def test_the_layer_it_was_made_from_keeps_its_own_weight_and_one_without_bits_stays_as_it_is():
    for bits in (4, None):
        original = randomised(nn.Linear(8, 4))
        before = dict(original.__dict__)
        layer = quantized(original, LayerConfig(weight=WeightConfig(bits=bits)))
        layer.pack()
        assert original.__dict__ == before
        assert layer.packed == (bits is not None) == (layer.weight is not original.weight)
        assert layer.bias is original.bias


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.double])
def test_scales_stay_float32_and_codes_integers_whatever_the_dtype(dtype):
    layer, inputs = layer_of("split", 4, "exact")
    layer.pack("int8")
    before = {name: tensor.clone() for name, tensor in layer.packed_state().items()}
    layer.to(dtype)
    assert_same_tensors(layer.packed_state(), before)
    assert layer.bias.dtype == dtype
    assert play(layer, [x.to(dtype) for x in inputs])[0][0].dtype == dtype


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("strict", [True, False])
def test_float_weights_are_not_cast_into_a_packed_layer_nor_codes_into_a_float_one(bits, strict):
    """torch would copy 0.3 into an int8 weight as 0."""
    floats, packed = layer_of("conv", bits)[0], layer_of("conv", bits)[0]
    packed.pack()
    for layer, state in ((packed, floats.state_dict()), (floats, packed.state_dict())):
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        with pytest.raises(RuntimeError, match=r"weight: expected torch\..*, got torch\..*modiff\.load"):
            layer.load_state_dict(state, strict=strict)
        assert_same_tensors(layer.state_dict(), before)
    packed.load_state_dict(packed.state_dict())


# ----------------------------------------------------------------------------------------------------- anchor codes


@pytest.mark.parametrize("rotation", ["none", "hadamard"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", LAYERS)
def test_anchor_codes_are_the_rounding_error_to_half_a_scale(kind, bits, rotation):
    layer, _ = layer_of(kind, bits, "exact", "mse", rotation=rotation)
    exact = layer.quantized_weight.floats(layer.weight).double()
    layer.pack("int8")
    weight, scales = layer.quantized_weight, layer.weight_error_scale.double().unbind(1)
    error = exact - weight.exact(layer.weight, torch.float64)
    for columns, scale in zip(error.split(weight.columns, 1), scales, strict=True):
        assert_within(columns, torch.zeros_like(columns), scale.reshape(-1, *[1] * (columns.dim() - 1)) / 2 + 1e-7)
    assert float(error.norm()) < 0.02 * float((exact - weight.dense(layer.weight, torch.float64)).norm())


@pytest.mark.parametrize(("bits", "anchor", "pack", "words"), [
    (4, "exact", None, "exact weights"),
    (None, "exact", "int8", "exact weights"),
    (4, "exact", "quantized", "quantized weights"),
    (4, "quantized", "int8", "quantized weights"),
    (4, "exact", "int8", "int8 anchor codes (1.5 bytes a weight)"),
    (8, "exact", "int8", "int8 anchor codes (2 bytes a weight)"),
])  # fmt: skip
def test_a_layer_says_what_it_anchors_with_and_keeps_codes_only_for_exact_anchors(bits, anchor, pack, words):
    layer, _ = layer_of("conv", bits, anchor)
    if pack:
        layer.pack(pack)
    assert layer.anchors_with == words
    assert hasattr(layer, ERROR) == layer.keeps_error() == ("codes" in words)


# ------------------------------------------------------------------------------------------------ read by somebody else


@pytest.mark.parametrize("rotation", ["none", "hadamard"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_packed_weight_is_read_as_the_floats_that_its_codes_stand_for(kind, bits, rotation):
    layer, (x, *_) = layer_of(kind, bits, rotation=rotation)
    floats = layer.weight.detach()
    layer.pack()
    assert (layer.weight.shape, layer.weight.dtype) == (floats.shape, torch.float32)
    assert 0 < relative_error(layer.weight, floats) < (0.2 if bits == 4 else 0.02)
    convolve = nn.functional.linear if kind in ("linear", "odd") else layer._conv_forward
    layer.clock.start()
    assert_within(convolve(x, layer.weight, layer.bias), evaluate(layer, x), 1e-5)
    assert layer.half().weight.dtype == torch.float16


@pytest.mark.parametrize("use", [
    lambda layer: layer.weight.add_(1),
    lambda layer: setattr(layer.weight, "data", torch.zeros(5, 12)),
    lambda layer: exec("layer.weight.data += 1", {"layer": layer}),
    lambda layer: layer.weight.__setitem__(0, 0.0),
    lambda layer: nn.init.zeros_(layer.weight),
    lambda layer: layer.quantized_weight.floats(layer.weight),
    lambda layer: layer.quantized_weight.fix(layer.quantized_weight.codes(layer.weight)),
    lambda layer: layer.quantized_weight.unfix(),
])  # fmt: skip
def test_what_would_write_a_packed_weight_or_needs_its_floats_is_refused(use):
    layer, _ = layer_of("linear", 4)
    layer.pack()
    before = layer.operator.weight.clone()
    with torch.no_grad(), pytest.raises(StateError, match=r"up.weight: expected a float weight, got a packed one"):
        use(layer)
    assert layer.quantized_weight.fixed
    assert_same_bits(layer.operator.weight.detach(), before)
