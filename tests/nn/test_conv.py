"""The modulated convolutions in every geometry against loops in float64, and against torch with bits off."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from modiff import (
    LayerConfig,
    ModulatedConv1d,
    ModulatedConv2d,
    ModulatedConv3d,
    ModulationConfig,
    QuantizerConfig,
    StateError,
    WeightConfig,
)
from tests.helpers import assert_float_error, assert_same_bits, assert_within, drifting
from tests.recipes import evaluate, play, quantized, randomised, recipe_of_layer, torch_operator
from tests.reference.recursion import run
from tests.strategies import trajectories

MODES = ("zeros", "reflect", "replicate", "circular")
VARIANTS = {
    "1d": (nn.Conv1d(4, 3, 3, padding=1), (2, 4, 7)),
    "1d strided, dilated": (nn.Conv1d(4, 2, 3, stride=2, dilation=2, bias=False), (2, 4, 9)),
    "2d 1x1": (nn.Conv2d(4, 3, 1), (2, 4, 3, 4)),
    "2d 3x3": (nn.Conv2d(4, 3, 3, padding=1), (2, 4, 4, 5)),
    "2d same, even kernel": (nn.Conv2d(4, 3, (2, 4), padding="same"), (2, 4, 4, 5)),
    "2d valid": (nn.Conv2d(4, 3, 2, padding="valid"), (2, 4, 3, 3)),
    "2d strided": (nn.Conv2d(4, 3, 3, stride=(2, 1), padding=(1, 0)), (2, 4, 5, 4)),
    "2d dilated": (nn.Conv2d(4, 3, 3, dilation=2, padding=2), (1, 4, 5, 5)),
    "2d grouped": (nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 3, 3)),
    "2d depthwise": (nn.Conv2d(4, 4, 3, groups=4, padding=1, bias=False), (2, 4, 3, 3)),
    "3d": (nn.Conv3d(4, 2, (1, 2, 2), stride=(1, 2, 1)), (1, 4, 2, 3, 3)),
    **{f"2d {m}": (nn.Conv2d(4, 2, 3, padding=(2, 1), padding_mode=m), (1, 4, 3, 3)) for m in MODES},
    **{f"1d {m}": (nn.Conv1d(4, 2, 4, padding="same", padding_mode=m), (1, 4, 6)) for m in MODES},
    "3d circular": (nn.Conv3d(4, 2, 2, padding=1, padding_mode="circular"), (1, 4, 2, 2, 2)),
}
OFF = {"weight": WeightConfig(bits=None), "activation": QuantizerConfig(bits=None)}
# Uneven "same" padding of an even kernel: torch says that it may copy the input. Ours calls the same function.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rotation", ["none", "hadamard"])
def test_states_and_outputs_equal_the_reference_in_every_geometry(variant, rotation):
    layer, shape = VARIANTS[variant]
    layer = randomised(layer).double()
    config = LayerConfig(
        weight=WeightConfig(bits=4),
        activation=QuantizerConfig(bits=4),
        modulation=ModulationConfig(state_dtype="float64"),
        rotation=rotation,
    )
    inputs = drifting(1, shape, 3, 0.2)
    modulated = quantized(layer, config)
    assert isinstance(modulated, (ModulatedConv1d, ModulatedConv2d, ModulatedConv3d))
    for (output, a, o), step in zip(play(modulated, inputs), run(inputs, recipe_of_layer(layer, config)), strict=True):
        assert_within(a, step.input_state, 1e-9)
        assert_within(o, step.output_state, 1e-9)
        assert_same_bits(output, o)


@pytest.mark.parametrize("variant", VARIANTS)
def test_with_bits_off_it_is_the_torch_layer_to_float_error(variant):
    layer, shape = VARIANTS[variant]
    for dtype in (torch.float32, torch.bfloat16):
        layer = randomised(layer).to(dtype)
        x = torch.randn(shape).to(dtype)
        bias = 0.0 if layer.bias is None else layer.bias.detach().double().reshape(-1, *[1] * (x.dim() - 2))
        exact = torch_operator(layer, layer.weight.detach())(x) + bias
        assert_float_error(quantized(layer, LayerConfig(**OFF))(x), layer(x), exact)


@given(
    inputs=trajectories((2, 8, 3), max_steps=4),
    bits=st.sampled_from([0, 2, 4, 8]),
    granularity=st.sampled_from(["auto", "tensor", "token", "input_channel"]),
    rotation=st.sampled_from(["none", "hadamard"]),
    split_and_groups=st.sampled_from([(None, 1), (2, 1), (6, 1), (None, 2), (None, 4)]),
    symmetric=st.booleans(),
)
@settings(max_examples=40)
def test_scales_splits_groups_and_rotations_mix_as_in_the_reference(
    inputs, bits, granularity, rotation, split_and_groups, symmetric
):
    split, groups = split_and_groups
    layer = randomised(nn.Conv1d(8, 4, 3, padding=1, groups=groups)).double()
    config = LayerConfig(
        weight=WeightConfig(bits=4),
        activation=QuantizerConfig(bits=bits, granularity=granularity, symmetric=symmetric),
        modulation=ModulationConfig(state_dtype="float64"),
        rotation=rotation,
    )
    expected = run(inputs, recipe_of_layer(layer, config, split))
    for (_, a, o), step in zip(play(quantized(layer, config, split), inputs), expected, strict=True):
        assert_within(a, step.input_state, 1e-9)
        assert_within(o, step.output_state, 1e-9)


def test_a_split_input_keeps_the_small_half_as_exact_as_the_large_one():
    layer = randomised(nn.Conv2d(8, 4, 1)).double()
    size = torch.cat([torch.full((5,), 100.0), torch.full((3,), 0.01)])[:, None, None]
    inputs = [x * size for x in drifting(0, (1, 8, 2, 2), 4, 0.3)]
    config = LayerConfig(activation=QuantizerConfig(bits=4), modulation=ModulationConfig(state_dtype="float64"))
    errors = {}
    for split in (None, 5):
        a = play(quantized(layer, config, split), inputs)[-1][1]
        errors[split] = float((a - inputs[-1])[:, 5:].norm() / inputs[-1][:, 5:].norm())
    assert errors[5] < 0.05
    assert errors[None] > 0.3


@pytest.mark.parametrize("weight", [WeightConfig(bits=4), WeightConfig(bits=4, search="mse")])
def test_a_split_convolution_is_the_sum_of_two_that_know_nothing_of_each_other(weight):
    whole = randomised(nn.Conv2d(8, 4, 3, padding=1)).double()
    first, second = (nn.Conv2d(n, 4, 3, padding=1, bias=bias).double() for n, bias in ((5, True), (3, False)))
    with torch.no_grad():
        whole.weight[:, 5:] *= 30
        first.weight.copy_(whole.weight[:, :5])
        first.bias.copy_(whole.bias)
        second.weight.copy_(whole.weight[:, 5:])
    state = ModulationConfig(state_dtype="float64")
    config = LayerConfig(weight=weight, activation=QuantizerConfig(bits=4), modulation=state)
    inputs = drifting(0, (2, 8, 5, 4), 4, 0.3)
    one = play(quantized(first, config), [x[:, :5] for x in inputs])
    two = play(quantized(second, config), [x[:, 5:] for x in inputs])
    for (found, _, _), (a, _, _), (b, _, _) in zip(play(quantized(whole, config, 5), inputs), one, two, strict=True):
        assert_within(found, a + b, 1e-9)


def test_a_scale_per_sample_is_the_default():
    x = torch.stack([torch.full((4, 2), 7.0), torch.full((4, 2), 0.07)])
    layer = quantized(randomised(nn.Conv1d(4, 2, 1)), LayerConfig(activation=QuantizerConfig(bits=4)))
    assert_within(play(layer, [torch.zeros(2, 4, 2), x])[1][1], x, 1e-6)


@pytest.mark.parametrize("variant", ["1d", "2d 3x3", "3d"])
def test_an_input_without_a_batch_axis_is_refused(variant):
    layer, shape = VARIANTS[variant]
    modulated = quantized(layer.float(), LayerConfig(rotation="hadamard"), name="conv_in")
    modulated.clock.start()
    with pytest.raises(StateError, match=rf"conv_in: expected {len(shape)} axes \(batch, channels, ...\)"):
        evaluate(modulated, torch.randn(shape[1:]))


def test_channels_last_inputs_give_the_same_states():
    layer = randomised(nn.Conv2d(4, 3, 3, padding=1))
    inputs = drifting(0, (2, 4, 4, 4), 4, 0.1, torch.float32)
    config = LayerConfig(activation=QuantizerConfig(bits=4), rotation="hadamard")
    straight = play(quantized(layer, config), inputs)
    turned = play(quantized(layer, config), [x.to(memory_format=torch.channels_last) for x in inputs])
    for one, other in zip(straight, turned, strict=True):
        assert_within(other[1], one[1], 1e-6)
        assert_within(other[2], one[2], 1e-5)
