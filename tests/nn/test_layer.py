"""What every modulated layer does with its states: contexts, repeated calls, batches, ends, and what it shares."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import modiff
from modiff import (
    ConfigError,
    LayerConfig,
    ModiffConfig,
    ModulatedLinear,
    ModulationConfig,
    QuantizerConfig,
    StateError,
    WeightConfig,
)
from modiff.core.observers import MinMaxObserver
from modiff.nn import QUANTIZED_CLASSES, quantized_class
from tests.helpers import assert_same_bits, assert_within, drifting
from tests.recipes import evaluate, play, quantized, randomised, recipe_of_layer
from tests.reference.recursion import run

CONFIG = LayerConfig(activation=QuantizerConfig(bits=4))
KINDS = {
    "linear": (lambda: randomised(nn.Linear(8, 4)), (3, 8)),
    "conv": (lambda: randomised(nn.Conv2d(8, 4, 3, padding=1)), (3, 8, 2, 2)),
}


def walk(kind: str, steps: int = 4, seed: int = 0) -> list[torch.Tensor]:
    return drifting(seed, KINDS[kind][1], steps, 0.2, torch.float32)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_two_trajectories_in_a_row_are_equal(kind):
    layer, inputs = quantized(KINDS[kind][0](), CONFIG), walk(kind)
    for first, second in zip(play(layer, inputs), play(layer, inputs), strict=True):
        for a, b in zip(first, second, strict=True):
            assert_same_bits(b, a)


def test_memory_lasts_the_trajectory_it_is_not_reset_inside(kind):
    """As in the published code: with a reset at every step, each step is a first step and nothing is ever quantized."""
    layer, inputs = quantized(KINDS[kind][0](), LayerConfig(activation=QuantizerConfig(bits=0))), walk(kind)
    outputs = [output for output, _, _ in play(layer, inputs)]
    for output in outputs[1:]:
        assert_same_bits(output, outputs[0])


def test_a_last_smaller_batch_is_fine_in_its_own_trajectory(kind):
    """As in the published code: step 1 of a batch must not be differenced against the last step of the batch before."""
    layer, inputs = quantized(KINDS[kind][0](), CONFIG), walk(kind)
    play(layer, inputs)
    small = [x[:1] for x in walk(kind, seed=1)]
    expected = play(quantized(KINDS[kind][0](), CONFIG), small)
    for ours, theirs in zip(play(layer, small), expected, strict=True):
        assert_same_bits(ours[0], theirs[0])


def test_a_batch_that_changes_inside_a_trajectory_is_refused_and_the_states_survive(kind):
    layer, inputs = quantized(KINDS[kind][0](), CONFIG, name="mid"), walk(kind)
    layer.clock.start()
    evaluate(layer, inputs[0])
    before = layer.state
    with pytest.raises(StateError, match=r"mid: expected an input of shape \(3, 8.*got \(2, 8"):
        evaluate(layer, inputs[1][:2])
    assert_same_bits(layer.state.input, before.input)
    assert_same_bits(layer.state.output, before.output)


def test_a_sample_s_result_does_not_depend_on_its_batch_and_a_permuted_batch_permutes_it(kind):
    layer, inputs = quantized(KINDS[kind][0](), CONFIG), walk(kind)
    order = torch.tensor([2, 0, 1])
    together = play(layer, inputs)
    for whole, turned in zip(together, play(layer, [x[order] for x in inputs]), strict=True):
        assert_within(turned[0], whole[0][order], 1e-6)
    for i in range(3):
        for whole, alone in zip(together, play(layer, [x[i : i + 1] for x in inputs]), strict=True):
            assert_within(alone[0], whole[0][i : i + 1], 1e-6)


def test_contexts_have_states_of_their_own(kind):
    layer = quantized(KINDS[kind][0](), CONFIG)
    runs = {"cond": walk(kind), "uncond": walk(kind, seed=1)}
    expected = {name: play(layer, inputs) for name, inputs in runs.items()}
    layer.clock.start()
    for t in range(4):
        for name, inputs in runs.items():
            layer.clock.context = name
            assert_same_bits(evaluate(layer, inputs[t]), expected[name][t][0])
            assert_same_bits(layer.state.input, expected[name][t][1])


def test_a_layer_called_twice_in_an_evaluation_has_two_states(kind):
    layer = quantized(KINDS[kind][0](), CONFIG)
    runs = [walk(kind), walk(kind, seed=1)]
    expected = [play(layer, inputs) for inputs in runs]
    layer.clock.start()
    for t in range(4):
        layer.clock.call(None)
        for inputs, results in zip(runs, expected, strict=True):
            assert_same_bits(layer(inputs[t]), results[t][0])
        layer.clock.returned()
    assert len(layer.loop.tensors()) == 4


def test_states_are_there_during_a_trajectory_and_freed_at_its_end(kind):
    layer, inputs = quantized(KINDS[kind][0](), CONFIG, name="up"), walk(kind)
    assert layer.loop.tensors() == []
    layer.clock.start()
    for x in inputs:
        evaluate(layer, x)
    assert [t.shape[0] for t in layer.loop.tensors()] == [3, 3]
    layer.clock.stop()
    assert layer.loop.tensors() == []
    assert layer.inputs.states == []
    with pytest.raises(StateError, match="up: expected states, got none"):
        _ = layer.state


def test_the_linear_predictor_keeps_the_moves_as_well(kind):
    config = LayerConfig(activation=QuantizerConfig(bits=4), modulation=ModulationConfig(predictor="linear"))
    layer = quantized(KINDS[kind][0](), config)
    layer.clock.start()
    counts = []
    for x in walk(kind, 3):
        evaluate(layer, x)
        counts.append(len(layer.loop.tensors()))
    assert counts == [2, 4, 4]


def test_inside_a_trajectory_but_outside_an_evaluation_is_refused(kind):
    layer = quantized(KINDS[kind][0](), CONFIG)
    layer.clock.start()
    evaluate(layer, walk(kind)[0])
    with pytest.raises(StateError, match="expected a running trajectory, got a call outside of one"):
        layer(walk(kind)[1])


@pytest.mark.parametrize(
    "config", [CONFIG, LayerConfig(modulation=None), LayerConfig(activation=QuantizerConfig(bits=None))]
)
def test_an_empty_batch_is_refused(kind, config):
    layer = quantized(KINDS[kind][0](), config, name="down")
    layer.clock.start()
    with pytest.raises(StateError, match=r"down: expected at least one sample, got an empty batch \(0, 8"):
        evaluate(layer, walk(kind)[0][:0])


def test_the_twin_shares_parameters_buffers_and_hooks_and_leaves_the_original_alone(kind):
    original = KINDS[kind][0]()
    original.register_buffer("marker", torch.ones(1))
    calls = []
    original.register_forward_hook(lambda *_: calls.append(1))
    attributes = dict(original.__dict__)
    modulated = quantized(original, CONFIG)
    assert modulated.weight is original.weight
    assert modulated.marker is original.marker
    assert modulated.state_dict().keys() == original.state_dict().keys()
    assert original.__dict__.keys() == attributes.keys()
    play(modulated, walk(kind))
    assert len(calls) == 4
    assert all(original.__dict__[name] is value for name, value in attributes.items())


def test_moving_the_twin_to_another_dtype_moves_the_original_s_parameters_too(kind):
    original = KINDS[kind][0]()
    modulated = quantized(original, CONFIG)
    play(modulated, walk(kind))
    modulated.to(torch.bfloat16)
    assert original.weight.dtype == modulated.weight.dtype == torch.bfloat16
    assert play(modulated, [x.bfloat16() for x in walk(kind)])[0][0].dtype == torch.bfloat16


def test_float32_layers_stay_near_the_float64_reference_over_fifty_steps(kind):
    """Each step rounds both states and one operator, a few units of 2^-24 of their size: far below the 4-bit error."""
    original = KINDS[kind][0]()
    inputs = walk(kind, steps=50)
    expected = run(inputs, recipe_of_layer(original, CONFIG))
    for (_, a, o), step in zip(play(quantized(original, CONFIG), inputs), expected, strict=True):
        bound = 50 * 8 * 2.0**-24
        assert_within(a, step.input_state, bound * float(step.input_state.abs().max()))
        assert_within(o, step.output_state, bound * 4 * float(step.output_state.abs().max()))


@pytest.mark.parametrize("compensation", ["closed_loop", "none"])
def test_without_compensation_the_output_leaves_the_layer_at_its_input_state(kind, compensation):
    original = KINDS[kind][0]()
    config = LayerConfig(
        weight=WeightConfig(bits=None),
        activation=QuantizerConfig(bits=3),
        modulation=ModulationConfig(error_compensation=compensation),
    )
    output, a, _ = play(quantized(original, config), walk(kind, steps=30))[-1]
    gap = float((output - original(a)).detach().norm() / output.norm())
    assert gap < 1e-5 if compensation == "closed_loop" else gap > 0.1


def test_only_layers_that_keep_torch_s_own_forward_have_a_twin():
    class Named(nn.Linear):
        """A subclass that adds nothing to the computation."""

    class Scaled(nn.Linear):
        """A subclass that computes something else."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    assert quantized_class(Named(2, 2)) is ModulatedLinear
    assert quantized_class(Scaled(2, 2)) is None
    assert quantized_class(nn.ConvTranspose2d(2, 2, 1)) is None
    assert quantized_class(quantized(nn.Linear(2, 2), CONFIG)) is None
    assert all(quantized_class(make()) in QUANTIZED_CLASSES.values() for make, _ in KINDS.values())


@pytest.mark.parametrize(
    ("layer", "split"),
    [(nn.Linear(8, 4), 0), (nn.Linear(8, 4), 8), (nn.Linear(8, 4), -3), (nn.Conv2d(8, 4, 1, groups=2), 4)],
)
def test_a_split_that_cuts_nothing_is_refused(layer, split):
    with pytest.raises(ConfigError, match=rf"up: expected a split between 0 and 8 .* got {split} with"):
        quantized(layer, CONFIG, split=split, name="up")


def test_static_scales_serve_a_layer_once_measured(kind):
    config = LayerConfig(activation=QuantizerConfig(bits=4, dynamic=False))
    layer, inputs = quantized(KINDS[kind][0](), config), walk(kind, 6)
    layer.quantizer.observers = (MinMaxObserver(),)
    measured = play(layer, inputs)
    layer.quantizer.freeze()
    scale = float(layer.quantizer.static[0].scale)
    residuals = [x - a for x, (_, a, _) in zip(inputs[1:], measured, strict=False)]
    assert scale == pytest.approx(max(float(r.abs().max()) for r in residuals) / 7, rel=1e-6)
    for x, (_, a, _) in list(zip(inputs, play(layer, inputs), strict=True))[1:]:
        assert_within(a, x, scale * (1 + 1e-5))  # half a step, and what the slightly other residuals clip


@pytest.mark.parametrize("execution", ["simulated", "integer"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_forward_with_gradients_works_and_its_backward_is_refused(compiled, execution):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.body = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.body(self.first(x).relu())

    torch.compiler.reset()
    model = Net()
    modiff.apply(model, ModiffConfig(layer=LayerConfig(execution=execution), include=("body",), min_weights=0))
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    x = torch.randn(3, 8)
    with modiff.trajectory(model):
        with torch.no_grad():
            expected = run(x)
    with modiff.trajectory(model):
        output = run(x.requires_grad_())
        assert_same_bits(output.detach(), expected)
        with pytest.raises(StateError, match=r"body: expected no gradient, got a backward pass"):
            output.sum().backward()
    with modiff.trajectory(model), torch.no_grad():
        assert not run(x).requires_grad


def test_the_gradient_of_a_layer_with_rounded_weights_alone_is_its_own():
    layer = quantized(nn.Linear(8, 4), LayerConfig(activation=QuantizerConfig(bits=None)))
    x = torch.randn(3, 8, requires_grad=True)
    layer(x).sum().backward()
    weight = layer.quantized_weight.dense(layer.weight, torch.float32)
    assert_within(x.grad, weight.sum(0).expand(3, 8), 1e-6)


def test_a_layer_may_be_called_by_keyword_as_torch_s_own():
    layer = quantized(nn.Linear(8, 4), LayerConfig(modulation=None))
    x = torch.randn(3, 8)
    assert_same_bits(layer(input=x), layer(x))
