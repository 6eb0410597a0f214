"""The modulated linear layer against loops in float64, and against torch where nothing is quantized."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from modiff import LayerConfig, ModulatedLinear, ModulationConfig, QuantizerConfig, StateError, WeightConfig
from tests.helpers import assert_float_error, assert_same_bits, assert_within, drifting
from tests.recipes import evaluate, float64, play, quantized, randomised, recipe_of_layer, sizes_of
from tests.reference import layers
from tests.reference.quantizer import quantize, quantize_weight
from tests.reference.recursion import run
from tests.strategies import modulation_configs, quantizer_configs, trajectories

OFF = LayerConfig(weight=WeightConfig(bits=None), activation=QuantizerConfig(bits=None))


@st.composite
def modulated_configs(draw: st.DrawFn) -> LayerConfig:
    activation = draw(quantizer_configs(lowest=(0,)).filter(lambda q: q.dynamic))
    return float64(
        LayerConfig(
            weight=WeightConfig(bits=draw(st.sampled_from([None, 2, 4, 8]))),
            activation=activation,
            modulation=draw(modulation_configs(activation)),
            rotation=draw(st.sampled_from(["none", "hadamard"])),
            rotation_block=draw(st.sampled_from([2, 64])),
        )
    )


@given(
    inputs=trajectories((2, 2, 12), max_steps=5),
    config=modulated_configs(),
    split=st.sampled_from([None, 4]),
    timesteps=st.sampled_from([None, [999.0, 900.0, 700.0, 650.0, 1.0]]),
)
@settings(max_examples=60)
def test_states_and_outputs_equal_the_reference(inputs, config, split, timesteps):
    layer = randomised(nn.Linear(12, 5)).double()
    expected = run(inputs, recipe_of_layer(layer, config, split), None if timesteps is None else sizes_of(timesteps))
    for (output, a, o), step in zip(play(quantized(layer, config, split), inputs, timesteps), expected, strict=True):
        bound = 1e-9 if timesteps is None else 1e-7  # ratios of step sizes, and gains times them, are float32
        assert_within(a, step.input_state, bound)
        assert_within(o, step.output_state, bound)
        assert_same_bits(output, o)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rotation", ["none", "hadamard"])
@pytest.mark.parametrize("bias", [True, False])
def test_with_bits_off_it_is_the_torch_layer_to_float_error(dtype, rotation, bias):
    layer = randomised(nn.Linear(64, 32, bias=bias)).to(dtype)
    config = LayerConfig(weight=OFF.weight, activation=OFF.activation, rotation=rotation)
    x = torch.randn(16, 64).to(dtype)
    exact = layers.linear(x, layer.weight.detach(), None if layer.bias is None else layer.bias.detach())
    if dtype == torch.float64:
        assert_within(quantized(layer, config)(x), exact, 1e-12)
    else:
        assert_float_error(quantized(layer, config)(x), layer(x), exact)


@pytest.mark.parametrize("granularity", ["tensor", "sample", "token"])
def test_plain_quantization_is_the_layer_at_the_quantized_input(granularity):
    layer = randomised(nn.Linear(12, 5)).double()
    config = LayerConfig(
        weight=WeightConfig(bits=4), activation=QuantizerConfig(bits=4, granularity=granularity), modulation=None
    )
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    expected = layers.linear(quantize(x, 4, granularity).value, quantize_weight(layer.weight.detach(), 4), layer.bias)
    assert_within(quantized(layer, config)(x), expected, 1e-12)


@pytest.mark.parametrize("shape", [(12,), (3, 12), (2, 3, 12), (2, 2, 2, 12)])
@pytest.mark.parametrize("bits", [4, None])
def test_any_number_of_leading_axes_is_taken(shape, bits):
    layer = randomised(nn.Linear(12, 5))
    config = LayerConfig(weight=WeightConfig(bits=None), activation=QuantizerConfig(bits=bits))
    x = torch.randn(shape)
    modulated = quantized(layer, config)
    modulated.clock.start()
    assert_within(evaluate(modulated, x), layer(x), 1e-6)
    assert evaluate(modulated, x + 0.1).shape == layer(x).shape


def test_a_scale_per_token_is_the_default():
    layer = quantized(randomised(nn.Linear(4, 2)), LayerConfig(activation=QuantizerConfig(bits=4)))
    x = torch.tensor([[7.0, 3.0, 2.0, 1.0], [0.07, 0.03, 0.02, 0.01]])
    play_inputs = [torch.zeros(2, 4), x]
    assert isinstance(layer, ModulatedLinear)
    assert_within(play(layer, play_inputs)[1][1], x, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_output_has_the_input_s_dtype_and_the_states_do_not(dtype):
    layer = randomised(nn.Linear(16, 8)).to(dtype)
    output, a, o = play(quantized(layer, LayerConfig()), drifting(0, (4, 16), 3, 0.1, dtype))[-1]
    assert (output.dtype, a.dtype, o.dtype) == (dtype, torch.float32, torch.float32)
    assert_same_bits(output, o.to(dtype))


def test_autocast_does_not_reach_the_states():
    layer = randomised(nn.Linear(16, 8))
    inputs = drifting(0, (4, 16), 4, 0.1, torch.float32)
    plainly = play(quantized(layer, LayerConfig()), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = play(quantized(layer, LayerConfig()), inputs)
    for (_, a, o), (_, b, p) in zip(plainly, cast, strict=True):
        assert_same_bits(b, a)
        assert_same_bits(p, o)


def test_outside_a_trajectory_only_layers_without_memory_run():
    layer, x = randomised(nn.Linear(16, 8)), torch.randn(2, 16)
    with pytest.raises(StateError, match="to_q: expected a running trajectory, got a call outside of one"):
        quantized(layer, LayerConfig(), name="to_q")(x)
    assert_within(quantized(layer, OFF)(x), layer(x), 1e-6)
    plain = LayerConfig(weight=WeightConfig(bits=None), modulation=None)
    assert_within(quantized(layer, plain)(x), layer(x), 0.1)


@pytest.mark.parametrize("compensation", ["closed_loop", "none"])
def test_neither_the_model_s_input_nor_its_output_is_shared_with_the_states(compensation):
    layer = randomised(nn.Linear(16, 8))
    config = LayerConfig(
        activation=QuantizerConfig(bits=8), modulation=ModulationConfig(error_compensation=compensation)
    )
    inputs = drifting(0, (4, 16), 4, 0.1, torch.float32)
    expected = play(quantized(layer, config), inputs)
    spoiled = quantized(layer, config)
    spoiled.clock.start()
    for x, (output, a, o) in zip(inputs, expected, strict=True):
        x = x.clone()
        ours = evaluate(spoiled, x)
        assert_same_bits(ours, output)
        x.fill_(float("nan"))
        ours.mul_(1000.0)
        assert_same_bits(spoiled.state.input, a)
        assert_same_bits(spoiled.state.output, o)
