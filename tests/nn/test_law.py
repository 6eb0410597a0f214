"""The law of the states: ô_t = A_q(â_t) + (A - A_q)(a_anchor) + bias, whatever the loop does."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import modiff
from modiff import LayerConfig, ModiffConfig, ModulationConfig, QuantizerConfig, WeightConfig
from modiff.model.attach import required_attachment
from modiff.nn import ModulatedLayer
from tests.helpers import assert_same_bits, assert_within, drifting
from tests.nn.building import LAYERS, drawn, group_of, integer, step, walk
from tests.recipes import evaluate, float64, play, quantized, randomised, state_of

LOOPS = {
    "hold": ModulationConfig(),
    "linear": ModulationConfig(predictor="linear", gain=0.8),
    "anchored again": ModulationConfig(reanchor_every=3),
    "linear, anchored again": ModulationConfig(predictor="linear", reanchor_every=2),
}
W4A4 = LayerConfig(weight=WeightConfig(bits=4), activation=QuantizerConfig(bits=4))
INT16 = dataclasses.replace(W4A4, activation=QuantizerConfig(bits=8), execution="integer")


def config_of(modulation: ModulationConfig, **settings) -> LayerConfig:
    return float64(dataclasses.replace(W4A4, modulation=modulation, **settings))


def law(layer: ModulatedLayer, state: Tensor, anchor: Tensor) -> Tensor:
    """A_q(â_t) + (A - A_q)(a_anchor) + bias in float64."""
    exact = layer.quantized_weight.floats(layer.weight).double()
    rounded = layer.quantized_weight.dense(layer.weight, torch.float64)
    return layer.operator.affine(state.double()) + layer.spec.operate(anchor.double(), exact - rounded, None)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("rotation", ["none", "hadamard"])
@pytest.mark.parametrize("loop", LOOPS)
def test_the_law_holds_at_every_step(layer, rotation, loop):
    original, inputs, split = drawn(layer, 7, torch.float64)
    ours, every = quantized(original, config_of(LOOPS[loop], rotation=rotation), split), LOOPS[loop].reanchor_every
    steps = play(ours, inputs)
    for t, (output, state, output_state) in enumerate(steps):
        anchor = steps[t - t % every if every else 0][1]
        assert_within(output_state, law(ours, state, anchor), 1e-12)
        assert_same_bits(output, output_state)


def test_int16_states_that_outgrow_their_grid_anchor_with_the_exact_weight():
    original = randomised(nn.Linear(16, 6))
    ours = quantized(original, INT16)
    steps = play(ours, [x * 4.0**i for i, x in enumerate(walk((2, 5, 16), 6))])
    exact, rounded = (
        [float((o - operator(state)).detach().norm() / o.norm()) for _, state, o in steps]
        for operator in (original, ours.operator.affine)
    )
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


def network(modulation: ModulationConfig) -> tuple[nn.Module, dict[str, ModulatedLayer]]:
    model = randomised(nn.Sequential(*(Block() for _ in range(3)))).double().eval()
    modiff.apply(model, ModiffConfig(layer=config_of(modulation), first_last="quantize", min_weights=0))
    return model, required_attachment(model, "test").layers


@pytest.mark.parametrize("stagger", [True, False])
@pytest.mark.parametrize("every", [0, 1, 3, 4])
def test_the_law_holds_for_shared_residuals_and_staggered_anchors(every, stagger):
    model, layers = network(ModulationConfig(reanchor_every=every, stagger=stagger))
    history = []
    with torch.no_grad(), modiff.trajectory(model):
        for x in drifting(0, (2, 3, 16), 9, 0.1):
            model(x)
            history.append({name: state_of(layer) for name, layer in layers.items()})
    groups = list(dict.fromkeys(id(layer.inputs) for layer in layers.values()))
    assert len(groups) == 6
    for name, layer in layers.items():
        turn, last = groups.index(id(layer.inputs)) if stagger else 0, 0
        for t, states in enumerate(history):
            last = t if every and (t - turn) % every == 0 else last
            assert_within(states[name].output, law(layer, states[name].input, history[last][name].input), 1e-12)


# ------------------------------------------------------------------------------------- weights that change on the way


def by_data(layer: ModulatedLayer) -> None:
    layer.weight.data += 0.1  # as a LoRA is fused: no new memory, no new version


def by_parameters(layer: ModulatedLayer) -> None:
    for parameter in layer.parameters():
        parameter.data *= 1.5


def in_place(layer: ModulatedLayer) -> None:
    with torch.no_grad():
        layer.weight.mul_(-1.5)


CHANGED = {
    "hold": config_of(LOOPS["hold"]),
    "linear": config_of(LOOPS["linear"]),
    "rotated": config_of(LOOPS["linear"], rotation="hadamard"),
    "float weights": config_of(LOOPS["linear"], weight=WeightConfig(bits=None)),
    "integers": integer(W4A4),
    "integers, linear": dataclasses.replace(W4A4, execution="integer", modulation=LOOPS["linear"]),
    "int16": INT16,
}


def as_a_buffer(layer: ModulatedLayer) -> None:
    weight = layer.weight.detach() * 1.5
    del layer.weight
    layer.register_buffer("weight", weight)


CHANGES = {
    "as a buffer": as_a_buffer,
    "by data": by_data,
    "in place": in_place,
    "replaced": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.detach().flip(0))),
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "by parameters()": by_parameters,
    "bias by data": lambda layer: layer.bias.data.add_(1),
    "bias replaced": lambda layer: setattr(layer, "bias", nn.Parameter(layer.bias.detach() + 1)),
    "bias gone": lambda layer: setattr(layer, "bias", None),
    "bias pruned": lambda layer: prune.l1_unstructured(layer, "bias", 0.5),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("form", CHANGED)
@pytest.mark.parametrize("kind", ["linear", "split conv"])
def test_a_weight_that_changes_within_a_trajectory_anchors_at_what_the_input_state_holds(change, form, kind):
    dtype = torch.float64 if CHANGED[form].execution == "simulated" else torch.float32
    original, inputs, split = drawn(kind, 6, dtype)
    ours = quantized(original, CHANGED[form], split)
    ours.clock.start()
    anchor = torch.empty(0)
    for t, x in enumerate(inputs):
        if t == 3:
            change(ours)
        output, (state, _) = evaluate(ours, x), state_of(ours)
        anchor = state.clone() if t in (0, 3) else anchor
        bound = 1e-12 if dtype == torch.float64 else 2e-3 if form == "int16" else 1e-5
        assert_within(output, law(ours, state, anchor), bound * (1 + float(output.abs().max())))
    assert_within(output, original(x), 0.2 * float(output.abs().max()))


@pytest.mark.parametrize("changed", [0, 1])
@pytest.mark.parametrize("predictor", ["hold", "linear"])
def test_a_weight_that_changes_leaves_the_others_of_its_group_as_they_are(changed, predictor):
    clock, layers = group_of(2, shared=True, config=config_of(LOOPS[predictor]))
    clock.start()
    anchors: dict[int, Tensor] = {}
    for t, x in enumerate(drifting(0, (2, 8), 6, 0.2)):
        if t == 3:
            by_data(layers[changed])
        outputs = step(clock, layers, x)
        for i, (layer, output) in enumerate(zip(layers, outputs, strict=True)):
            state = state_of(layer).input
            anchors |= {i: state.clone()} if t == 0 or (t == 3 and i == changed) else {}
            assert_within(output, law(layer, state, anchors[i]), 1e-12)
    assert len(layers[0].inputs.states) == 1


def test_a_weight_that_is_read_or_moved_and_stays_as_it_was_changes_nothing():
    original, inputs, _ = drawn("linear", 4)
    ours = quantized(original, dataclasses.replace(W4A4, execution="integer"))
    expected = play(ours, inputs)
    ours.clock.start()
    for x, (output, _, _) in zip(inputs, expected, strict=True):
        ours.weight.sum() + ours.bias.sum()
        original.weight.data = original.weight.data.clone()
        assert_same_bits(evaluate(ours, x), output)
