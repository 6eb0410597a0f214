"""The law of the states: ô_t = A_q(â_t) + (A - A_q)(a_anchor) + bias, whatever the loop does."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import modiff
from modiff import LayerConfig, ModiffConfig, ModulationConfig, QuantizerConfig, WeightConfig
from modiff.model.attach import required_attachment
from modiff.nn import ModulatedLayer
from tests.helpers import assert_same_bits, assert_within, drifting
from tests.nn.building import LAYERS, drawn, walk
from tests.recipes import play, quantized, randomised

W4 = WeightConfig(bits=4)
LOOPS = {
    "hold": ModulationConfig(),
    "linear": ModulationConfig(predictor="linear", gain=0.8),
    "anchored again": ModulationConfig(reanchor_every=3),
    "linear, anchored again": ModulationConfig(predictor="linear", reanchor_every=2),
}


def config_of(modulation: ModulationConfig, bits: int = 4, **settings) -> LayerConfig:
    return LayerConfig(weight=W4, activation=QuantizerConfig(bits=bits), modulation=modulation, **settings)


FIXED = config_of(ModulationConfig(state_dtype="int16"), bits=8, execution="integer")


def in_float64(modulation: ModulationConfig) -> ModulationConfig:
    return dataclasses.replace(modulation, state_dtype="float64")


def bias_free(layer: ModulatedLayer, x: Tensor, weight: Tensor) -> Tensor:
    return layer.spec.operate(x.double(), weight, None)


def law(layer: ModulatedLayer, state: Tensor, anchor: Tensor) -> Tensor:
    """A_q(â_t) + (A - A_q)(a_anchor) + bias in float64."""
    exact = layer.quantized_weight.floats(layer.weight).double()
    rounded = layer.quantized_weight.dense(layer.weight, torch.float64)
    zero = layer.operator.affine(torch.zeros_like(state, dtype=torch.float64))
    return bias_free(layer, state, rounded) + bias_free(layer, anchor, exact - rounded) + zero


def anchors(states: Sequence[Tensor], every: int) -> list[Tensor]:
    """The input state of the last anchor, at each step."""
    return [states[t - t % every if every else 0] for t in range(len(states))]


@pytest.mark.parametrize("layer", ["linear", "conv", "conv in groups", "split conv", "split linear"])
@pytest.mark.parametrize("rotation", ["none", "hadamard"])
@pytest.mark.parametrize("loop", LOOPS)
def test_the_law_holds_at_every_step(layer, rotation, loop):
    original, inputs, split = drawn(layer, 7, torch.float64)
    ours = quantized(original, config_of(in_float64(LOOPS[loop]), rotation=rotation), split)
    steps = play(ours, inputs)
    states = [state for _, state, _ in steps]
    for (output, state, output_state), anchor in zip(steps, anchors(states, LOOPS[loop].reanchor_every), strict=True):
        assert_within(output_state, law(ours, state, anchor), 1e-12)
        assert_same_bits(output, output_state)


@pytest.mark.parametrize("layer", LAYERS)
def test_the_first_output_is_that_of_the_layer_before_rounding(layer):
    original, inputs, split = drawn(layer, 1, torch.float64)
    ((output, _, _),) = play(quantized(original, config_of(in_float64(LOOPS["hold"])), split), inputs)
    assert_within(output, original(inputs[0]), 1e-12)


@pytest.mark.parametrize("modulation", [
    ModulationConfig(anchor_weights="quantized"), ModulationConfig(first_step="coded", rounds=3)
], ids=["quantized", "coded first step"])  # fmt: skip
def test_quantized_anchors_give_the_papers_law(modulation):
    """A coded first step has no input in full precision to multiply: its codes meet the quantized weight."""
    ours = quantized(randomised(nn.Linear(16, 6)).double(), config_of(in_float64(modulation)))
    for _, state, output_state in play(ours, walk((2, 5, 16), 5, torch.float64)):
        assert_within(output_state, ours.operator.affine(state), 1e-12)


# ------------------------------------------------------------------------------------------------------- on integers


@pytest.mark.parametrize("layer", LAYERS)
def test_int16_states_start_from_the_exact_layer_at_what_the_integers_stand_for(layer):
    original, inputs, split = drawn(layer)
    ours = quantized(original, FIXED, split)
    steps = play(ours, inputs)
    for step, (x, (output, state, output_state)) in enumerate(zip(inputs, steps, strict=True)):
        grid = float(output_state.abs().max()) * 4 / 2**15  # headroom 1.25, then the next power of two
        assert_within(output_state, law(ours, state, steps[0][1]), (step + 1) * 2 * grid)  # two roundings where split
        assert_within(output, output_state, grid)
        assert float((x - state).norm() / x.norm()) < 0.03


def test_int16_states_that_outgrow_their_grid_anchor_with_the_exact_weight():
    original = randomised(nn.Linear(16, 6))
    ours = quantized(original, FIXED)
    inputs = [x * 4.0**i for i, x in enumerate(walk((2, 5, 16), 6))]
    steps = play(ours, inputs)
    errors = []
    for operator in (original, ours.operator.affine):
        errors.append([float((o - operator(state)).detach().norm() / o.norm()) for _, state, o in steps])
    exact, rounded = errors
    assert min(exact[1:]) < 1e-3
    assert min(rounded) > 0.02


# ------------------------------------------------------------------------------------------------------- on a model


class Block(nn.Module):
    """q, k and v read one tensor; out reads another."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 24) for _ in range(3))
        self.out = nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.q(x)) * self.k(x) + self.v(x))


def network() -> nn.Module:
    return randomised(nn.Sequential(*(Block() for _ in range(3)))).double().eval()


def states_of(model: nn.Module, modulation: ModulationConfig, steps: int) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """Both states of every layer at every step of a trajectory; the model keeps modiff."""
    layer = config_of(in_float64(modulation))
    modiff.apply(model, ModiffConfig(layer=layer, first_last="quantize", min_weights=0))
    layers = required_attachment(model, "test").layers
    history = []
    with torch.no_grad(), modiff.trajectory(model):
        for x in drifting(0, (2, 3, 16), steps, 0.1):
            model(x)
            history.append({name: (layer.loop.state.input, layer.loop.state.output) for name, layer in layers.items()})
    return history


def groups(model: nn.Module) -> list[list[str]]:
    """Names of the layers that read one tensor, in the order of the model."""
    layers = required_attachment(model, "test").layers
    names: dict[int, list[str]] = {}
    for name, layer in layers.items():
        names.setdefault(id(layer.inputs), []).append(name)
    return list(names.values())


@pytest.mark.parametrize("stagger", [True, False])
@pytest.mark.parametrize("every", [0, 1, 3, 4])
def test_the_law_holds_for_shared_residuals_and_staggered_anchors(every, stagger):
    model = network()
    steps = states_of(model, ModulationConfig(reanchor_every=every, stagger=stagger), 9)
    layers = required_attachment(model, "test").layers
    assert [len(group) for group in groups(model)] == [3, 1] * 3
    for number, names in enumerate(groups(model)):
        turn = number if stagger else 0
        for name in names:
            last = 0
            for step, states in enumerate(steps):
                if every and (step - turn) % every == 0:
                    last = step
                state, output = states[name]
                assert_within(output, law(layers[name], state, steps[last][name][0]), 1e-12)


def test_a_compiled_model_anchors_as_the_eager_one():
    torch.compiler.reset()
    model = network()
    config = ModiffConfig(layer=config_of(in_float64(ModulationConfig(reanchor_every=3))), min_weights=0)
    modiff.apply(model, config)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    inputs = drifting(0, (2, 3, 16), 6, 0.1)
    outputs = []
    for network_ in (model, compiled):
        with torch.no_grad(), modiff.trajectory(model):
            outputs.append([network_(x).clone() for x in inputs])
    for eager, graph in zip(*outputs, strict=True):
        assert_within(graph, eager, 1e-12)
