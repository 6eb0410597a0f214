"""Linear layers and convolutions in every geometry against loops in float64, and against torch with bits off."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from modiff import LayerConfig, ModulatedLinear, ModulationConfig, QuantizerConfig, StateError, WeightConfig
from modiff.nn import QUANTIZED_CLASSES, quantized_class
from tests.helpers import (
    assert_float_error,
    assert_same_bits,
    assert_same_tensors,
    assert_within,
    drifting,
    relative_error,
)
from tests.nn.test_law import law
from tests.recipes import evaluate, float64, play, quantized, randomised, recipe_of_layer, sizes_of, torch_operator
from tests.reference import layers
from tests.reference.quantizer import quantize, quantize_weight
from tests.reference.recursion import run
from tests.strategies import modulation_configs, quantizer_configs, trajectories

MODES = ("zeros", "reflect", "replicate", "circular")
VARIANTS = {
    "linear": (nn.Linear(64, 32), (16, 64)),
    "linear without bias": (nn.Linear(64, 32, bias=False), (16, 64)),
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
W4A4 = {"weight": WeightConfig(bits=4), "activation": QuantizerConfig(bits=4)}
FLOAT64 = ModulationConfig(state_dtype="float64")
# Uneven "same" padding of an even kernel: torch says that it may copy the input. Ours calls the same function.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def equals_the_reference(layer, config, inputs, split=None, timesteps=None):
    expected = run(inputs, recipe_of_layer(layer, config, split), None if timesteps is None else sizes_of(timesteps))
    for (output, a, o), step in zip(play(quantized(layer, config, split), inputs, timesteps), expected, strict=True):
        bound = 1e-9 if timesteps is None else 1e-7  # ratios of step sizes, and gains times them, are float32
        assert_within(a, step.input_state, bound)
        assert_within(o, step.output_state, bound)
        assert_same_bits(output, o)


@st.composite
def modulated_configs(draw: st.DrawFn) -> LayerConfig:
    activation = draw(quantizer_configs(lowest=(0,)).filter(lambda q: q.dynamic))
    return float64(LayerConfig(
        weight=WeightConfig(bits=draw(st.sampled_from([None, 2, 4, 8]))), activation=activation,
        modulation=draw(modulation_configs(activation)), rotation=draw(st.sampled_from(["none", "hadamard"])),
        rotation_block=draw(st.sampled_from([2, 64])),
    ))  # fmt: skip


@given(
    inputs=trajectories((2, 8, 3), max_steps=5), config=modulated_configs(),
    split_and_groups=st.sampled_from([None, (None, 1), (2, 1), (6, 1), (None, 2), (None, 4)]),
    timesteps=st.sampled_from([None, [999.0, 900.0, 700.0, 650.0, 1.0]]),
)  # fmt: skip
@settings(max_examples=120)
def test_a_layer_equals_the_reference(inputs, config, split_and_groups, timesteps):
    if split_and_groups is None:
        inputs = [x.transpose(1, 2).contiguous() for x in inputs]
        equals_the_reference(randomised(nn.Linear(8, 5)).double(), config, inputs, 3, timesteps)
    else:
        split, groups = split_and_groups
        layer = randomised(nn.Conv1d(8, 4, 3, padding=1, groups=groups)).double()
        equals_the_reference(layer, config, inputs, split, timesteps)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rotation", ["none", "hadamard"])
def test_every_geometry_equals_the_reference(variant, rotation):
    layer, shape = VARIANTS[variant]
    config = LayerConfig(**W4A4, modulation=FLOAT64, rotation=rotation)
    equals_the_reference(randomised(layer).double(), config, drifting(1, shape, 3, 0.2))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_with_bits_off_it_is_the_torch_layer_to_float_error(variant, dtype):
    layer, shape = VARIANTS[variant]
    layer, x = randomised(layer).to(dtype), torch.randn(shape).to(dtype)
    bias = 0.0
    if layer.bias is not None:
        bias = layer.bias.detach().double().reshape(-1, *[1] * (layer.weight.dim() - 2))
    exact = torch_operator(layer, layer.weight.detach())(x) + bias
    for rotation in ("none", "hadamard") if isinstance(layer, nn.Linear) else ("none",):
        ours = quantized(layer, LayerConfig(**OFF, rotation=rotation))(x)
        if dtype == torch.float64:
            assert_within(ours, exact, 1e-12)
        else:
            assert_float_error(ours, layer(x), exact)


@pytest.mark.parametrize("granularity", ["tensor", "sample", "token"])
def test_plain_quantization_is_the_layer_at_the_quantized_input(granularity):
    layer, x = randomised(nn.Linear(12, 5)).double(), torch.randn(2, 3, 12, dtype=torch.float64)
    activation = QuantizerConfig(bits=4, granularity=granularity)
    config = LayerConfig(weight=W4A4["weight"], activation=activation, modulation=None)
    expected = layers.linear(quantize(x, 4, granularity).value, quantize_weight(layer.weight.detach(), 4), layer.bias)
    assert_within(quantized(layer, config)(x), expected, 1e-12)


@pytest.mark.parametrize("shape", [(12,), (3, 12), (2, 3, 12), (2, 2, 2, 12)])
def test_any_number_of_leading_axes_is_taken(shape):
    layer, x = randomised(nn.Linear(12, 5)), torch.randn(shape)
    assert_within(quantized(layer, LayerConfig(**OFF))(x), layer(x), 1e-6)
    for (output, _, _), value in zip(play(quantized(layer, LayerConfig()), [x, x + 0.1]), (x, x + 0.1), strict=True):
        assert_within(output, layer(value), 0.02)


@pytest.mark.parametrize("variant", ["1d", "2d 3x3", "3d"])
def test_an_input_without_a_batch_axis_is_refused(variant):
    layer, shape = VARIANTS[variant]
    modulated = quantized(layer.float(), LayerConfig(rotation="hadamard"), name="conv_in")
    modulated.clock.start()
    with pytest.raises(StateError, match=rf"conv_in: expected {len(shape)} axes \(batch, channels, ...\)"):
        evaluate(modulated, torch.randn(shape[1:]))


class Named(nn.Linear):
    """A subclass that adds nothing to the computation."""


class Standardized(nn.Conv2d):
    def forward(self, x):
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std((1, 2, 3), keepdim=True)
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def computing(compute: Callable[..., torch.Tensor]) -> nn.Linear:
    """A layer of a class of its own, by what it makes of itself and its input."""
    return type("Own", (nn.Linear,), {"forward": compute})(8, 4)


CIRCULAR = {"padding": 1, "padding_mode": "circular"}
MADE = {
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(8, 4)), (2, 8)),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(8, 4, bias=False)), (2, 3, 8)),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Conv2d(8, 4, 3, **CIRCULAR)), (2, 8, 4, 4)),
    "weight norm by a hook": (lambda: weight_norm(nn.Conv1d(8, 4, 3)), (2, 8, 5)),
    "spectral norm by a hook": (lambda: spectral_norm(nn.Linear(8, 4)), (2, 8)),
    "pruned bias": (lambda: prune.l1_unstructured(nn.Linear(8, 4), "bias", 0.4), (2, 8)),
    "pruned": (lambda: prune.l1_unstructured(nn.Linear(8, 4), "weight", 0.4), (2, 8)),
    "standardized": (lambda: Standardized(8, 4, 3, stride=2, groups=2), (2, 8, 5, 5)),
    "scaled": (lambda: computing(lambda m, x: functional.linear(x, m.weight * 0.5, m.bias * 0.1)), (2, 8)),
    "transposed": (lambda: nn.ConvTranspose2d(8, 6, 3, 2, 1, output_padding=1, groups=2), (2, 8, 4, 3)),
    "transposed along one axis": (lambda: nn.ConvTranspose1d(8, 6, 4, stride=2, bias=False), (2, 8, 5)),
    "transposed along three axes": (lambda: weight_norm(nn.ConvTranspose3d(4, 6, 2, dilation=2)), (1, 4, 3, 2, 2)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("rotation", ["none", "hadamard"])
@pytest.mark.parametrize("kind", MADE)
def test_what_makes_a_weight_is_evaluated_once_and_stays_in_the_layer_that_it_was_made_from(kind, rotation):
    make, shape = MADE[kind]
    layer, inputs = make().double(), drifting(0, shape, 4, 0.2)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    exact = layer.eval()(inputs[0])
    assert_within(quantized(layer.train(), LayerConfig(**OFF))(inputs[0]), exact, 1e-12)
    ours = quantized(layer, LayerConfig(**W4A4, modulation=FLOAT64, rotation=rotation))
    steps = play(ours, inputs)
    assert_within(steps[0][0], exact, 1e-12)
    for output, state, _ in steps:
        assert_within(output, law(ours, state, steps[0][1]), 1e-12)
    assert ours.state_dict().keys() <= {"weight", "bias"}
    floats = ours.weight.detach()
    ours.pack()
    assert relative_error(ours.weight, floats) < 0.2
    assert layer.training
    assert_same_tensors(layer.state_dict(), before)


def test_a_transposed_convolution_takes_an_output_size():
    layer, x = nn.ConvTranspose2d(4, 3, 2, stride=2).double(), torch.randn(1, 4, 3, 3, dtype=torch.float64)
    ours = quantized(layer, LayerConfig(modulation=FLOAT64))
    for size in ((7, 6), (6, 6), None):
        ours.clock.start()
        ours.clock.call(None)
        assert_within(ours(input=x, output_size=size), layer(x, output_size=size), 1e-12)
        ours.clock.stop()


OTHERS = {
    "scales what comes out": computing(lambda m, x: 2 * functional.linear(x, m.weight, m.bias)),
    "clamps what comes out": computing(lambda m, x: functional.linear(x, m.weight, m.bias).clamp(-1e4, 1e4)),
    "clamps what it reads": computing(lambda m, x: functional.linear(x.clamp(-1e4, 1e4), m.weight, m.bias)),
    "has weights of its input": computing(lambda m, x: functional.linear(x, m.weight * x.mean(), m.bias)),
    "reads two tensors": computing(lambda m, x, scale: functional.linear(x, m.weight * scale)),
    "is modulated": quantized(nn.Linear(2, 2), LayerConfig()),
    "has no weight": nn.Identity(),
}


def test_only_layers_whose_forward_is_their_linear_map_are_quantized():
    assert quantized_class(Named(2, 2)) is ModulatedLinear
    assert all(quantized_class(layer) in QUANTIZED_CLASSES.values() for layer, _ in VARIANTS.values())
    assert {name for name, layer in OTHERS.items() if quantized_class(layer)} == set()
