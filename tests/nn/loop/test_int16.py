"""Layers with both states in 16-bit integers: half the memory, the law within the grid, and a way out of 16 bits."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from modiff import ConfigError, LayerConfig, ModulationConfig, QuantizerConfig
from modiff.nn.loop.int16 import Int16Input, Int16Loop
from tests.helpers import assert_same_bits, assert_within, drifting
from tests.nn.loop.test_integer import LAYERS, walk
from tests.recipes import evaluate, play, quantized, randomised

FIXED = LayerConfig(
    activation=QuantizerConfig(bits=4),
    modulation=ModulationConfig(state_dtype="int16", anchor_weights="quantized"),
    execution="integer",
)
FLOAT = dataclasses.replace(FIXED, modulation=ModulationConfig(anchor_weights="quantized"))
W8A8 = dataclasses.replace(FIXED, activation=QuantizerConfig(bits=8))


def growing(shape: tuple[int, ...], factor: float, steps: int = 6) -> list[Tensor]:
    return [x * factor**i for i, x in enumerate(walk(shape, steps))]


@pytest.mark.parametrize("layer", LAYERS)
def test_the_law_holds_within_the_grid_and_the_inputs_error_within_a_power_of_two_scale(layer):
    make, shape, split = LAYERS[layer]
    original, inputs = randomised(make()), walk(shape)
    ours = quantized(original, W8A8, split)
    assert isinstance(ours.loop, Int16Loop)
    for step, (x, (output, state, held)) in enumerate(zip(inputs, play(ours, inputs), strict=True)):
        exact = ours.operator.affine(state.double())
        grid = float(held.abs().max()) * 4 / 2**15  # headroom 1.25, then the next power of two
        assert_within(held, exact, (step + 1) * 2 * grid)  # a rounding each step, two for a split layer
        assert_within(output, held, grid)
        assert_within(state, x, float((x - state).abs().max()) + 1e-9)
        assert float((x - state).norm() / x.norm()) < 0.03


def test_states_take_half_the_memory_of_float32_ones():
    original, inputs = randomised(nn.Conv2d(8, 4, 3, padding=1)), walk((2, 8, 16, 16))
    sizes = []
    for config in (FLOAT, FIXED):
        layer = quantized(original, config)
        layer.clock.start()
        for x in inputs:
            evaluate(layer, x)
        sizes.append(sum(t.numel() * t.element_size() for t in layer.loop.tensors()))
        layer.clock.stop()
    assert sizes[0] == 4 * (2 * 8 * 256 + 2 * 4 * 256)
    assert sizes[1] == sizes[0] // 2 + 2 * 4  # and two grids


@pytest.mark.parametrize("layer", ["linear", "conv", "split conv"])
def test_errors_are_near_those_of_float32_states(layer):
    make, shape, split = LAYERS[layer]
    original, inputs = randomised(make()), walk(shape, steps=12)
    errors = []
    for config in (FLOAT, FIXED):
        ours = quantized(original, config, split)
        exact = [
            ours.operator.affine(x.double()) for x in inputs
        ]  # the weight as it is coded: only inputs and states err
        found = play(ours, inputs)
        errors.append(float(sum((o - e).square().sum() for (o, _, _), e in zip(found[1:], exact[1:], strict=True))))
    assert errors[1] < 2.0**2 * errors[0]  # a scale rounded up to a power of two is at most twice as coarse


def test_the_output_starts_from_what_the_integers_hold_and_not_from_the_input():
    layer = nn.Linear(64, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    x = torch.full((1, 64), 0.33333)
    x[0, 0] = 1.0  # the grid is 2^-14, and every other channel is rounded by a third of it, the same way
    ours = quantized(layer, W8A8)
    ((output, state, _),) = play(ours, [x])
    assert_within(output, ours.operator.affine(state.double()), 1e-5)
    assert float(x.double().sum() - state.double().sum()) > 1e-3


@pytest.mark.parametrize("layer", ["linear", "conv", "split conv"])
def test_an_input_that_outgrows_its_grid_starts_again(layer):
    make, shape, split = LAYERS[layer]
    original, inputs = randomised(make()), growing(shape, 3.0)
    ours = quantized(original, W8A8, split)
    found = play(ours, inputs)
    for x, (_, state, held) in zip(inputs, found, strict=True):
        exact = ours.operator.affine(state.double())
        assert_within(held, exact, 12 * float(held.abs().max()) * 4 / 2**15)
        assert float((x - state).norm() / x.norm()) < 0.6  # the step that clips is late, the next one exact
    assert any(float((x - state).abs().max()) < float(x.abs().max()) / 2**14
               for x, (_, state, _) in zip(inputs[1:], found[1:], strict=True))  # fmt: skip


@pytest.mark.parametrize("layer", ["linear", "conv", "split conv"])
def test_an_input_that_begins_with_zeros_starts_again_at_its_first_values(layer):
    make, shape, split = LAYERS[layer]
    ours = quantized(randomised(make()), W8A8, split)
    inputs = [torch.zeros(shape), torch.zeros(shape), *[0.3 * torch.randn(shape)] * 4]
    found = play(ours, inputs)
    x, (_, state, held) = inputs[-1], found[-1]
    assert float((x - state).norm() / x.norm()) < 1e-3
    assert_within(held, ours.operator.affine(x.double()), 0.01 * float(held.abs().max()))


@pytest.mark.parametrize("place", [0, 7])
def test_a_nan_in_either_part_of_a_split_input_is_in_the_output(place):
    make, shape, split = LAYERS["split conv"]
    ours, inputs = quantized(randomised(make()), W8A8, split), growing(shape, 1.0)
    inputs[2] = inputs[2].clone()
    inputs[2].select(1, min(place, shape[1] - 1)).fill_(torch.nan)
    assert play(ours, inputs[:3])[-1][0].isnan().all()


def test_an_output_that_outgrows_its_grid_starts_again_from_the_input_state():
    """Inputs stay in their range while their sum grows sixteenfold: only the output state leaves 16 bits."""
    layer = nn.Linear(16, 3, bias=True)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.bias.copy_(torch.tensor([0.5, -0.5, 0.0]))
    signs = torch.ones(2, 16)
    signs[:, ::2] = -1
    inputs = [signs + 0.01, signs + 0.01, torch.ones(2, 16), torch.ones(2, 16)]
    ours = quantized(layer, W8A8)
    found = play(ours, inputs)
    for _, state, held in found:
        assert_within(held, ours.operator.affine(state.double()), 0.02)
    assert found[2][2].max() > 15
    assert found[1][2].max() < 1


def test_a_shared_residual_starts_again_for_all_its_readers():
    first, second = (quantized(randomised(nn.Linear(8, 4), seed), W8A8) for seed in (0, 1))
    second.loop.clock = first.clock
    second.share_with(first)
    first.clock.start()
    for x in growing((3, 8), 4.0):
        first.clock.call(None)
        first(x)
        second(x)
        first.clock.returned()
        for layer in (first, second):
            state, held = layer.state
            assert_within(held, layer.operator.affine(state.double()), 12 * float(held.abs().max()) * 4 / 2**15)
    assert first.loop.memories["default", 0].input is second.loop.memories["default", 0].input
    assert isinstance(first.loop.memories["default", 0].input, Int16Input)
    first.clock.stop()


def test_an_input_that_changes_its_memory_layout_is_the_same_input():
    original, inputs = randomised(nn.Conv2d(8, 4, 3, padding=1)), walk((2, 8, 4, 4))
    expected = play(quantized(original, FIXED), inputs)
    other = [x.to(memory_format=torch.channels_last) if i % 2 else x for i, x in enumerate(inputs)]
    for mine, theirs in zip(play(quantized(original, FIXED), other), expected, strict=True):
        assert_same_bits(mine[1], theirs[1])


def test_a_layer_without_kernels_keeps_float32_states():
    config = dataclasses.replace(FIXED, activation=QuantizerConfig(bits=4, symmetric=False))
    layer = quantized(randomised(nn.Linear(8, 4)), config)
    assert not layer.on_integers
    for _, state, held in play(layer, drifting(0, (2, 8), 3, 0.3, torch.float32)):
        assert (state.dtype, held.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("execution", {"execution": "simulated"}),
        ("activation.dynamic", {"activation": QuantizerConfig(dynamic=False)}),
        ("activation.refresh_every", {"activation": QuantizerConfig(refresh_every=2)}),
        ("modulation.predictor", {"modulation": ModulationConfig(state_dtype="int16", predictor="linear")}),
        ("modulation.first_step", {"modulation": ModulationConfig(state_dtype="int16", first_step="coded")}),
    ],
)
def test_what_integer_states_cannot_do_is_refused(field, changes):
    with pytest.raises(ConfigError, match=rf"LayerConfig.{field}: expected .* with state_dtype='int16'"):
        dataclasses.replace(FIXED, **changes)


@pytest.mark.parametrize("config", [FIXED, FLOAT], ids=["integers", "floats"])
@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 3, 16)])
def test_inputs_that_do_not_lie_dense_in_memory_give_what_their_copies_give(config, shape):
    original = randomised(nn.Linear(16, 6))
    inputs = [x[..., ::2] for x in walk((*shape[:-1], 2 * shape[-1]))]
    found, expected = (
        play(quantized(original, config), inputs),
        play(quantized(original, config), [x.clone() for x in inputs]),
    )
    for mine, theirs in zip(found, expected, strict=True):
        for ours, wanted in zip(mine, theirs, strict=True):
            assert_same_bits(ours, wanted)
