"""Modulated layers: what each does with its states, and every geometry against loops in float64 and against torch."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import modiff
from modiff import (
    ConfigError,
    LayerConfig,
    ModiffConfig,
    ModiffWarning,
    ModulatedLinear,
    ModulationConfig,
    QuantizerConfig,
    StateError,
    WeightConfig,
)
from modiff.nn import QUANTIZED_CLASSES, quantized_class
from tests.helpers import (
    assert_float_error,
    assert_same_bits,
    assert_same_tensors,
    assert_within,
    drifting,
    relative_error,
)
from tests.nn.building import W8A4, integer, same_bits
from tests.nn.test_law import law
from tests.recipes import (
    evaluate,
    float64,
    play,
    quantized,
    randomised,
    recipe_of_layer,
    sizes_of,
    state_of,
    torch_operator,
)
from tests.reference.recursion import run
from tests.strategies import modulation_configs, quantizer_configs, trajectories

KINDS = {
    "linear": (lambda: randomised(nn.Linear(8, 4)), (3, 8)),
    "conv": (lambda: randomised(nn.Conv2d(8, 4, 3, padding=1)), (3, 8, 2, 2)),
}
EXECUTIONS = {"simulated": W8A4, "integer": integer(W8A4), "int16": dataclasses.replace(W8A4, execution="integer")}


def walk(kind: str, steps: int = 4, seed: int = 0) -> list[torch.Tensor]:
    return drifting(seed, KINDS[kind][1], steps, 0.2, torch.float32)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=EXECUTIONS)
def config(request: pytest.FixtureRequest) -> LayerConfig:
    return EXECUTIONS[request.param]


def test_the_states_begin_again_with_a_batch_of_another_size_and_one_line_says_so(kind, config, monkeypatch):
    monkeypatch.setattr("modiff.errors._WARNED", set())
    layer, inputs = quantized(KINDS[kind][0](), config, name="mid"), walk(kind)
    layer.clock.start()
    for x in inputs[:2]:
        evaluate(layer, x)
    small = [x[:2] for x in inputs[2:]]
    with pytest.warns(ModiffWarning, match=r"mid: expected an input of shape \(3, .* as in the step before, got \(2"):
        found = [evaluate(layer, x) for x in small]
    for output, (expected, *_) in zip(found, play(quantized(KINDS[kind][0](), config), small), strict=True):
        assert_same_bits(output, expected)


def test_a_sample_s_result_does_not_depend_on_its_batch_and_a_permuted_batch_permutes_it(kind):
    layer, inputs = quantized(KINDS[kind][0](), W8A4), walk(kind)
    together = play(layer, inputs)
    for order in ([2, 0, 1], [0], [1], [2]):
        for whole, alone in zip(together, play(layer, [x[order] for x in inputs]), strict=True):
            assert_within(alone[0], whole[0][order], 1e-6)


def test_contexts_and_repeated_calls_in_an_evaluation_have_states_of_their_own(kind, config):
    layer, runs = quantized(KINDS[kind][0](), config), [walk(kind), walk(kind, seed=1)]
    expected = [play(layer, inputs) for inputs in runs]
    layer.clock.start()
    for t in range(4):
        for number, inputs in enumerate(runs):
            layer.clock.context = f"branch {number}"
            assert_same_bits(evaluate(layer, inputs[t]), expected[number][t][0])
            assert_same_bits(state_of(layer).input, expected[number][t][1])
    layer.clock.stop()
    layer.clock.start()
    for t in range(4):
        layer.clock.call(None)
        for number, inputs in enumerate(runs):
            assert_same_bits(layer(inputs[t]), expected[number][t][0])
        layer.clock.returned()
    assert len(layer.loop.tensors()) == (8 if config.state_dtype == "int16" else 4)  # and a grid each


def test_outside_of_an_evaluation_in_a_trajectory_only_layers_without_memory_run(kind):
    original, x = KINDS[kind][0](), walk(kind)[0]
    layer = quantized(original, W8A4, name="to_q")
    with pytest.raises(StateError, match="to_q: expected a running trajectory, got a call outside of one"):
        layer(x)
    for start in (layer.clock.start, lambda: evaluate(layer, x)):
        start()
        with pytest.raises(StateError, match=r"to_q: expected a call of .*, got one of a module inside of it"):
            layer(x)
    plain = quantized(original, LayerConfig(modulation=None))
    assert_within(plain(input=x), original(x), 0.1)


@pytest.mark.parametrize("form", [W8A4, LayerConfig(modulation=None)])
def test_an_empty_batch_gives_an_empty_output(form):
    layer = quantized(nn.Linear(8, 4), form, name="down")
    layer.clock.start()
    assert evaluate(layer, torch.empty(0, 8)).shape == (0, 4)
    assert evaluate(layer, torch.ones(2, 8)).shape == (2, 4)


@pytest.mark.parametrize(("groups", "split"), [(1, 0), (1, 8), (1, -3), (2, 4)])
def test_a_split_that_cuts_nothing_is_refused(groups, split):
    with pytest.raises(ConfigError, match=rf"up: expected a split between 0 and 8 .* got {split} with"):
        quantized(nn.Conv2d(8, 4, 1, groups=groups), W8A4, split=split, name="up")


def test_autocast_does_not_reach_the_states(config):
    layer, inputs = KINDS["linear"][0](), walk("linear")
    plainly = play(quantized(layer, config), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same_bits([step[1:] for step in play(quantized(layer, config), inputs)], [step[1:] for step in plainly])


@pytest.mark.parametrize("form", [
    W8A4, dataclasses.replace(W8A4, modulation=ModulationConfig(error_compensation="none")), integer(W8A4)
])  # fmt: skip
def test_neither_the_model_s_input_nor_its_output_is_shared_with_the_states(form):
    layer, inputs = KINDS["linear"][0](), walk("linear")
    spoiled = quantized(layer, form)
    spoiled.clock.start()
    for x, (output, *states) in zip(inputs, play(quantized(layer, form), inputs), strict=True):
        x = x.clone()
        ours = evaluate(spoiled, x)
        assert_same_bits(ours, output)
        x.fill_(float("nan"))
        ours.mul_(1000.0)
        same_bits([state_of(spoiled)], [states])


@pytest.mark.parametrize(("form", "input_bound", "output_bound"), [
    (W8A4, 0, 1e-5),
    (dataclasses.replace(W8A4, rotation="hadamard"), 1e-6, 1e-5),
    (integer(W8A4), 0, 1e-5),
    (LayerConfig(execution="integer"), 0, 1e-3),
])  # fmt: skip
def test_inputs_that_change_their_memory_layout_are_the_same_inputs(form, input_bound, output_bound):
    layer, inputs = KINDS["conv"][0](), drifting(0, (2, 8, 4, 4), 5, 0.1, torch.float32)
    other = [x.to(memory_format=torch.channels_last) if i % 2 else x for i, x in enumerate(inputs)]
    steps, expected = (play(quantized(layer, form), each) for each in (other, inputs))
    for (_, state, output), (_, expected_state, expected_output) in zip(steps, expected, strict=True):
        assert_within(state, expected_state, input_bound)
        assert_within(output, expected_output, output_bound)


@pytest.mark.parametrize(("compiled", "execution"), [(False, "simulated"), (False, "integer"), (True, "integer")])
def test_a_forward_with_gradients_works_and_its_backward_is_refused(compiled, execution):
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    modiff.apply(model, ModiffConfig(layer=LayerConfig(execution=execution), include=("2",), min_weights=0))
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    x = torch.randn(3, 8)
    with modiff.trajectory(model), torch.no_grad():
        expected = run(x)
    with modiff.trajectory(model):
        output = run(x.requires_grad_())
        assert_same_bits(output.detach(), expected)
        with pytest.raises(StateError, match=r"2: expected no gradient, got a backward pass"):
            output.sum().backward()
    with modiff.trajectory(model), torch.no_grad():
        assert not run(x).requires_grad


def test_the_gradient_of_a_layer_with_rounded_weights_alone_is_its_own():
    layer = quantized(nn.Linear(8, 4), LayerConfig(activation=QuantizerConfig(bits=None)))
    x = torch.randn(3, 8, requires_grad=True)
    layer(x).sum().backward()
    weight = layer.quantized_weight.dense(layer.weight, torch.float32)
    assert_within(x.grad, weight.sum(0).expand(3, 8), 1e-6)


MODES = ("zeros", "reflect", "replicate", "circular")
VARIANTS = {
    "linear": (nn.Linear(64, 32), (16, 64)),
    "1d": (nn.Conv1d(4, 3, 3, padding=1), (2, 4, 7)),
    "1d strided, dilated": (nn.Conv1d(4, 2, 3, stride=2, dilation=2, bias=False), (2, 4, 9)),
    "2d 3x3": (nn.Conv2d(4, 3, 3, padding=1), (2, 4, 4, 5)),
    "2d same, even kernel": (nn.Conv2d(4, 3, (2, 4), padding="same"), (2, 4, 4, 5)),
    "2d valid": (nn.Conv2d(4, 3, 2, padding="valid"), (2, 4, 3, 3)),
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


@pytest.mark.parametrize("variant", ["1d", "2d 3x3", "3d"])
def test_a_sample_without_a_batch_axis_is_a_batch_of_one_and_other_axes_get_torch_s_message(variant):
    layer, shape = VARIANTS[variant]
    kept = torch.randn(shape[1:])
    alone, batch = (quantized(layer.float(), LayerConfig(rotation="hadamard"), name="conv_in") for _ in range(2))
    for one in (alone, batch):
        one.clock.start()
    for step in (1.0, 0.9, 0.7):
        assert_same_bits(evaluate(alone, step * kept), evaluate(batch, step * kept[None])[0])
    with pytest.raises(RuntimeError, match="to have dimension" if shape is None else "Expected|expected"):
        evaluate(alone, kept[0])


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
    assert quantized_class(type("Named", (nn.Linear,), {})(2, 2)) is ModulatedLinear
    assert all(quantized_class(layer) in QUANTIZED_CLASSES.values() for layer, _ in VARIANTS.values())
    assert {name for name, layer in OTHERS.items() if quantized_class(layer)} == set()
