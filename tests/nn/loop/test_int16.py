"""Layers with both states in 16-bit integers: half the memory, the law within the grid, and a way out of 16 bits."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from modiff import ConfigError, ModulationConfig, QuantizerConfig
from modiff.nn.loop import int16
from modiff.nn.loop.int16 import Int16Input
from tests.helpers import assert_within
from tests.nn.building import INT16, LAYERS, group_of, integer, same_bits, step, walk
from tests.recipes import play, quantized, randomised, state_of

few_layers = pytest.mark.parametrize("layer", ["linear", "conv", "split conv"])


def grid_of(output: Tensor) -> float:
    """Headroom 1.25, then the next power of two."""
    return float(output.abs().max()) * 4 / 2**15


def growing(shape: tuple[int, ...], factor: float, steps: int = 6) -> list[Tensor]:
    return [x * factor**i for i, x in enumerate(walk(shape, steps))]


@few_layers
def test_an_input_that_outgrows_its_grid_or_begins_with_zeros_starts_again(layer):
    make, shape, split = LAYERS[layer]
    ours, inputs = quantized(randomised(make()), INT16, split), growing(shape, 3.0)
    errors = []
    for x, (_, state, output) in zip(inputs, play(ours, inputs), strict=True):
        assert_within(output, ours.operator.affine(state.double()), 12 * grid_of(output))
        assert float((x - state).norm() / x.norm()) < 0.6  # the step that clips is late, the next one exact
        errors.append(float((x - state).abs().max() / x.abs().max()))
    assert min(errors[1:]) < 2.0**-14
    inputs = [torch.zeros(shape), torch.zeros(shape), *[0.3 * torch.randn(shape)] * 4]
    x, (_, state, output) = inputs[-1], play(ours, inputs)[-1]
    assert float((x - state).norm() / x.norm()) < 1e-3
    assert_within(output, ours.operator.affine(x.double()), 0.01 * float(output.abs().max()))


@pytest.mark.parametrize("channel", [0, 7])
def test_a_nan_in_either_half_of_a_split_input_is_in_the_output(channel):
    make, shape, split = LAYERS["split conv"]
    inputs = walk(shape, 3)
    inputs[2].select(1, channel).fill_(torch.nan)
    assert play(quantized(randomised(make()), INT16, split), inputs)[-1][0].isnan().all()


def test_an_output_that_outgrows_its_grid_starts_again_from_the_input_state():
    """Inputs stay in their range while their sum grows sixteenfold: only the output state leaves 16 bits."""
    layer, signs = nn.Linear(16, 3), torch.ones(2, 16)
    nn.init.ones_(layer.weight)
    signs[:, ::2] = -1
    ours = quantized(layer, INT16)
    steps = play(ours, [signs + 0.01, signs + 0.01, torch.ones(2, 16), torch.ones(2, 16)])
    for _, state, output in steps:
        assert_within(output, ours.operator.affine(state.double()), 0.02)
    assert steps[1][2].max() < 1
    assert steps[2][2].max() > 15


def test_a_shared_residual_starts_again_for_all_its_readers():
    clock, layers = group_of(2, shared=True, config=INT16)
    clock.start()
    for x in growing((3, 8), 4.0):
        step(clock, layers, x)
        for layer in layers:
            state, output = state_of(layer)
            assert_within(output, layer.operator.affine(state.double()), 12 * grid_of(output))
    first, second = (layer.loop.memories["default", 0].input for layer in layers)
    assert first is second
    assert isinstance(first, Int16Input)


@pytest.mark.parametrize(("field", "changes"), [
    ("execution", {"execution": "simulated"}),
    ("activation.dynamic", {"activation": QuantizerConfig(dynamic=False)}),
    ("activation.refresh_every", {"activation": QuantizerConfig(refresh_every=2)}),
    ("modulation.predictor", {"modulation": ModulationConfig(state_dtype="int16", predictor="linear")}),
    ("modulation.first_step", {"modulation": ModulationConfig(state_dtype="int16", first_step="coded")}),
])  # fmt: skip
def test_what_integer_states_cannot_do_is_refused_and_has_float32_states_where_the_config_does_not_say(field, changes):
    config = dataclasses.replace(INT16, modulation=ModulationConfig(state_dtype="int16"))
    with pytest.raises(ConfigError, match=rf"LayerConfig.{field}: expected .* with state_dtype='int16'"):
        dataclasses.replace(config, **changes)
    if loop := changes.get("modulation"):
        changes = {"modulation": dataclasses.replace(loop, state_dtype="auto")}
    assert dataclasses.replace(INT16, **changes).state_dtype == "float32"


def test_states_are_float32_where_no_kernel_runs_a_layer_and_on_a_gpu_unless_told(monkeypatch):
    told, gpu = dataclasses.replace(INT16.modulation, state_dtype="int16"), torch.device("cuda")
    assert [int16.keeps_int16(config, gpu) for config in (INT16.modulation, told)] == [False, True]
    unknown = nn.Conv2d(8, 4, 3, padding=1, padding_mode="reflect")
    for config in (INT16, dataclasses.replace(INT16, modulation=told)):
        assert quantized(unknown, config).loop.state_dtype == "float32"
        assert quantized(nn.Linear(16, 6), config).loop.state_dtype == "int16"
    monkeypatch.setattr(int16, "keeps_int16", lambda config, device: False)
    make, shape, split = LAYERS["split conv"]
    layer, inputs = randomised(make()), walk(shape)
    ours = quantized(layer, INT16, split)
    assert ours.loop.state_dtype == "float32"
    same_bits(play(ours, inputs), play(quantized(layer, integer(INT16), split), inputs))


@pytest.mark.parametrize("modulation", [INT16.modulation, integer(INT16).modulation])
@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 3, 16)])
def test_inputs_that_do_not_lie_dense_in_memory_give_what_their_copies_give(modulation, shape):
    config = dataclasses.replace(INT16, activation=QuantizerConfig(bits=4), modulation=modulation)
    layer = quantized(randomised(nn.Linear(16, 6)), config)
    inputs = [x[..., ::2] for x in walk((*shape[:-1], 2 * shape[-1]))]
    same_bits(play(layer, inputs), play(layer, [x.clone() for x in inputs]))
