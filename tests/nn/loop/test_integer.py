"""Layers on real integers: the codes and input states of the simulation bit for bit, outputs within float error."""

from __future__ import annotations

import dataclasses
import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from modiff import LayerConfig, ModulationConfig, QuantizerConfig, WeightConfig
from modiff.core.observers import MinMaxObserver
from modiff.kernels.backend import PREPACKED
from modiff.nn.loop.integer import ByteCode
from tests.helpers import assert_same_bits, assert_within, drifting, worst
from tests.nn.building import LAYERS, TIMES, W8A4, integer, output_bound, walk
from tests.recipes import evaluate, play, quantized, randomised, recipe_of_layer, sizes_of
from tests.reference.recursion import run

LINEAR = ModulationConfig(predictor="linear", gain=0.8)
PAPER = ModulationConfig(anchor_weights="quantized")
CONFIGS = {
    "W8A4": W8A4,
    "W8A8": LayerConfig(),
    "W4A3 clipped": LayerConfig(weight=WeightConfig(bits=4), activation=QuantizerConfig(bits=3, clip=0.7)),
    "one scale": LayerConfig(activation=QuantizerConfig(bits=6, granularity="tensor")),
    "linear predictor": LayerConfig(activation=QuantizerConfig(bits=4), modulation=LINEAR),
    "rotated": LayerConfig(activation=QuantizerConfig(bits=4), rotation="hadamard", rotation_block=8),
    "scales of every second step": LayerConfig(activation=QuantizerConfig(bits=4, refresh_every=2)),
    "coded first step": LayerConfig(modulation=ModulationConfig(first_step="coded", rounds=2, reanchor_every=3)),
}


def plainly(config: LayerConfig) -> LayerConfig:
    return dataclasses.replace(config, modulation=None)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("config", CONFIGS)
def test_input_states_equal_the_simulation_bit_for_bit_and_outputs_within_float_error(layer, config):
    make, shape, split = LAYERS[layer]
    original, inputs = randomised(make()), walk(shape)
    simulated = play(quantized(original, CONFIGS[config], split), inputs, TIMES)
    ours = quantized(original, integer(CONFIGS[config]), split)
    assert ours.on_integers
    for (output, state, output_state), (expected, simulated_state, simulated_output) in zip(
        play(ours, inputs, TIMES), simulated, strict=True
    ):
        assert_same_bits(state, simulated_state)
        bound = output_bound(original, inputs[0], len(inputs))
        assert_within(output_state, simulated_output, bound)
        assert_within(output, expected, bound)
        assert output.dtype == expected.dtype


@pytest.mark.parametrize("layer", LAYERS)
def test_outputs_are_at_most_twice_as_far_from_the_float64_reference_as_the_simulation(layer):
    make, shape, split = LAYERS[layer]
    original, inputs = randomised(make()), walk(shape)
    config = dataclasses.replace(W8A4, activation=QuantizerConfig(bits=8), modulation=LINEAR)
    exact = run([x.double() for x in inputs], recipe_of_layer(original, config, split), sizes_of(TIMES))
    ours = play(quantized(original, integer(config), split), inputs, TIMES)
    theirs = play(quantized(original, config, split), inputs, TIMES)
    worst_ours = max(worst(a[0], step.output_state) for a, step in zip(ours, exact, strict=True))
    worst_theirs = max(worst(a[0], step.output_state) for a, step in zip(theirs, exact, strict=True))
    assert worst_ours <= 2 * worst_theirs


@pytest.mark.parametrize("layer", LAYERS)
def test_plain_layers_equal_the_simulation_within_float_error(layer):
    make, shape, split = LAYERS[layer]
    original, inputs = randomised(make()), walk(shape, steps=2)
    for config in (plainly(W8A4), plainly(LayerConfig())):
        ours, theirs = quantized(original, integer(config), split), quantized(original, config, split)
        for x in inputs:
            assert_within(evaluate(ours, x), evaluate(theirs, x), output_bound(original, x, 1))


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.integers(1, 20), st.integers(1, 9), st.integers(2, 8), st.integers(2, 8), st.booleans(), st.integers(0, 99))
def test_the_papers_law_holds_for_any_shape_and_bits(inputs, outputs, weight_bits, bits, conv, seed):
    layer = nn.Conv2d(inputs, outputs, 3, padding=1) if conv else nn.Linear(inputs, outputs)
    original = randomised(layer, seed)
    weight, activation = WeightConfig(bits=weight_bits), QuantizerConfig(bits=bits)
    config = integer(LayerConfig(weight=weight, activation=activation, modulation=PAPER))
    walked = drifting(seed, (2, inputs, 3, 4) if conv else (2, 3, inputs), 4, 0.3, torch.float32)
    ours = quantized(original, config)
    for x, (output, state, output_state) in zip(walked, play(ours, walked), strict=True):
        exact = ours.spec.operate(state.double(), ours.quantized_weight.dense(ours.weight, torch.float64), None)
        exact = exact + layer.bias.detach().double().reshape(-1, *[1] * 2 * conv)
        assert_within(output_state, exact, output_bound(original, x, 4) + 1e-6)
        assert_same_bits(output, output_state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_output_has_the_dtype_of_the_input_and_the_state_keeps_its_own(dtype):
    original = randomised(nn.Conv2d(8, 4, 3, padding=1)).to(dtype)
    inputs = walk((2, 8, 4, 4), dtype=dtype)
    simulated = play(quantized(original, W8A4), inputs)
    for (output, state, output_state), theirs in zip(
        play(quantized(original, integer(W8A4)), inputs), simulated, strict=True
    ):
        assert (output.dtype, state.dtype, output_state.dtype) == (dtype, torch.float32, torch.float32)
        assert_same_bits(state, theirs[1])
        assert_within(output_state, theirs[2], 1e-4)


@pytest.mark.parametrize("layer", ["linear", "conv", "split conv"])
@pytest.mark.parametrize("state_dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("predictor", ["hold", "linear"])
def test_states_of_half_the_width_are_rounded_as_in_the_simulation(layer, state_dtype, predictor):
    make, shape, split = LAYERS[layer]
    modulation = ModulationConfig(state_dtype=state_dtype, predictor=predictor)
    config = LayerConfig(activation=QuantizerConfig(bits=4), modulation=modulation)
    original, inputs = randomised(make()), walk(shape)
    ours = quantized(original, integer(config), split)
    assert ours.on_integers
    error = {"float16": 2.0**-10, "bfloat16": 2.0**-7}[state_dtype]  # the output state is rounded at each step
    for (_, state, output_state), (_, simulated_state, simulated_output) in zip(
        play(ours, inputs, TIMES), play(quantized(original, config, split), inputs, TIMES), strict=True
    ):
        assert_same_bits(state, simulated_state)
        assert output_state.dtype == getattr(torch, state_dtype)
        assert_within(output_state, simulated_output, 3 * len(inputs) * error * float(simulated_output.abs().max()))


def test_a_steady_step_makes_bytes_and_never_the_values_behind_them():
    layer = quantized(randomised(nn.Linear(16, 6)), integer(W8A4))
    layer.clock.start()
    first, second = walk((2, 16), steps=2)
    evaluate(layer, first)
    (code,) = layer.loop.memories["default", 0].input.advance(second, None).codes
    assert isinstance(code, ByteCode)
    ((codes, scale),) = code.parts
    assert (codes.dtype, code.zero, scale.shape) == (torch.uint8, 8, (2, 1))
    assert_same_bits(code.value(), (codes.float() - 8) * scale)
    layer.clock.stop()


REASONS = {
    "keeps floats": (lambda: nn.Linear(8, 4), LayerConfig(weight=WeightConfig(bits=None))),
    "is not quantized": (lambda: nn.Linear(8, 4), LayerConfig(activation=QuantizerConfig(bits=None))),
    "0 bits send nothing": (lambda: nn.Linear(8, 4), LayerConfig(activation=QuantizerConfig(bits=0))),
    "zero point": (lambda: nn.Linear(8, 4), LayerConfig(activation=QuantizerConfig(symmetric=False))),
    "summed axis": (lambda: nn.Linear(8, 4), LayerConfig(activation=QuantizerConfig(granularity="input_channel"))),
    "several pixels": (lambda: nn.Conv2d(8, 4, 3), LayerConfig(activation=QuantizerConfig(granularity="token"))),
    "'circular'": (lambda: nn.Conv2d(8, 4, 3, padding=1, padding_mode="circular"), LayerConfig()),
    "one side more": (lambda: nn.Conv2d(8, 4, 2, padding="same"), LayerConfig()),
    "for study": (lambda: nn.Linear(8, 4), LayerConfig(modulation=ModulationConfig(error_compensation="none"))),
    "kept in float64": (lambda: nn.Linear(8, 4), LayerConfig(modulation=ModulationConfig(state_dtype="float64"))),
}


@pytest.mark.parametrize("reason", REASONS)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_what_no_kernel_can_run_is_simulated_and_says_why(reason):
    make, config = REASONS[reason]
    original = randomised(make())
    ours, theirs = quantized(original, integer(config)), quantized(original, config)
    assert not ours.on_integers
    assert reason in ours.unsupported
    inputs = walk((2, 8) if isinstance(original, nn.Linear) else (2, 8, 5, 5), steps=3)
    for layer in (ours, theirs):
        layer.clock.start()
    for x in inputs:
        assert_same_bits(evaluate(ours, x), evaluate(theirs, x))


def test_scales_are_measured_in_the_simulation_and_used_on_integers():
    config = LayerConfig(activation=QuantizerConfig(bits=4, dynamic=False, granularity="tensor", clip=0.8))
    original, inputs = randomised(nn.Conv2d(8, 4, 3, padding=1)), walk((2, 8, 4, 4))
    quantized_layers = [quantized(original, config), quantized(original, integer(config))]
    for layer in quantized_layers:
        assert layer.quantizer is not None
        layer.quantizer.watch(lambda: MinMaxObserver(None))
    measuring = [play(layer, inputs) for layer in quantized_layers]
    for layer in quantized_layers:
        assert layer.quantizer is not None
        layer.quantizer.freeze()
    for simulated, ours in (measuring, [play(layer, inputs) for layer in quantized_layers]):
        for theirs, mine in zip(simulated, ours, strict=True):
            assert_same_bits(mine[1], theirs[1])
            assert_within(mine[0], theirs[0], 1e-4)


@pytest.mark.parametrize("by", ["its bytes", "its codes"])
def test_a_weight_written_in_place_is_quantized_again_and_an_equal_one_keeps_its_kernel(monkeypatch, by):
    if by == "its codes":
        monkeypatch.setattr("modiff.nn.weight.fingerprint", lambda _: None)
    layer = quantized(randomised(nn.Linear(16, 6)), integer(W8A4))
    inputs = walk((2, 16), steps=3)
    play(layer, inputs)
    assert layer.on_integers
    first = layer.loop.kernels
    play(layer, inputs)
    assert layer.loop.kernels is first
    with torch.no_grad():
        layer.weight.mul_(-2.0)
    expected = play(quantized(_copy_of(layer), W8A4), inputs)
    for mine, theirs in zip(play(layer, inputs), expected, strict=True):
        assert_within(mine[0], theirs[0], 1e-4)
    assert layer.loop.kernels is not first


def _copy_of(layer: nn.Linear) -> nn.Linear:
    copy = nn.Linear(layer.in_features, layer.out_features)
    copy.load_state_dict(layer.state_dict())
    return copy


@pytest.mark.parametrize("split", [None, 5])
def test_a_packed_weight_gives_the_same_outputs_and_is_read_as_it_is_kept(split):
    config = LayerConfig(weight=WeightConfig(bits=4), activation=QuantizerConfig(bits=4), modulation=PAPER)
    original, inputs = randomised(nn.Conv2d(8, 4, 3, padding=1)), walk((2, 8, 4, 4))
    expected = play(quantized(original, integer(config), split), inputs)
    packed = quantized(original, integer(config), split)
    packed.pack()
    for mine, theirs in zip(play(packed, inputs), expected, strict=True):
        assert_same_bits(mine[1], theirs[1])
        assert_within(mine[0], theirs[0], 1e-4)
    assert packed.on_integers
    assert packed.loop.kernels[0].weight.dtype == (torch.uint8 if split is None else torch.int8)


def test_what_backends_made_of_a_weight_goes_with_the_layer():
    gc.collect()
    before = PREPACKED.bytes_held()
    layer = quantized(randomised(nn.Linear(64, 64)), integer(W8A4))
    play(layer, walk((2, 64), steps=2))
    assert PREPACKED.bytes_held() > before
    del layer
    gc.collect()
    assert PREPACKED.bytes_held() == before


def test_nan_is_seen_in_the_output_under_a_dynamic_scale():
    layer = quantized(randomised(nn.Linear(16, 6)), integer(W8A4))
    inputs = walk((2, 16), steps=3)
    inputs[1][0, 3] = torch.nan
    outputs = [output for output, _, _ in play(layer, inputs)]
    assert outputs[1][0].isnan().all()
    assert outputs[2][1].isfinite().all()
