"""What every modulated layer does with its states: contexts, repeated calls, batches, ends, and what it shares."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import modiff
from modiff import ConfigError, LayerConfig, ModiffConfig, ModiffWarning, ModulationConfig, QuantizerConfig, StateError
from tests.helpers import assert_same_bits, assert_within, drifting
from tests.nn.building import W8A4, integer, same_bits
from tests.recipes import evaluate, play, quantized, randomised, recipe_of_layer, state_of
from tests.reference.recursion import run

KINDS = {
    "linear": (lambda: randomised(nn.Linear(8, 4)), (3, 8)),
    "conv": (lambda: randomised(nn.Conv2d(8, 4, 3, padding=1)), (3, 8, 2, 2)),
}
EXECUTIONS = {"simulated": W8A4, "integer": integer(W8A4)}


def walk(kind: str, steps: int = 4, seed: int = 0) -> list[torch.Tensor]:
    return drifting(seed, KINDS[kind][1], steps, 0.2, torch.float32)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=EXECUTIONS)
def config(request: pytest.FixtureRequest) -> LayerConfig:
    return EXECUTIONS[request.param]


def test_a_trajectory_knows_nothing_of_the_one_before(kind, config):
    """As in the published code: step 1 of a batch must not be differenced against the last step of the batch before."""
    layer = quantized(KINDS[kind][0](), config)
    play(layer, walk(kind))
    small = [x[:1] for x in walk(kind, seed=1)]
    same_bits(play(layer, small), play(quantized(KINDS[kind][0](), config), small))


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
    assert len(layer.loop.tensors()) == 4


def test_outside_of_an_evaluation_in_a_trajectory_only_layers_without_memory_run(kind):
    original, x = KINDS[kind][0](), walk(kind)[0]
    layer = quantized(original, W8A4, name="to_q")
    for start in (lambda: None, layer.clock.start, lambda: evaluate(layer, x)):
        start()
        with pytest.raises(StateError, match="to_q: expected a running trajectory, got a call outside of one"):
            layer(x)
    plain = quantized(original, LayerConfig(modulation=None))
    assert_within(plain(input=x), original(x), 0.1)


@pytest.mark.parametrize("form", [W8A4, LayerConfig(modulation=None)])
def test_an_empty_batch_gives_an_empty_output(form):
    layer = quantized(nn.Linear(8, 4), form, name="down")
    layer.clock.start()
    assert evaluate(layer, torch.empty(0, 8)).shape == (0, 4)
    assert evaluate(layer, torch.ones(2, 8)).shape == (2, 4)


def test_float32_layers_stay_near_the_float64_reference_over_fifty_steps(kind):
    """Each step rounds both states and one operator, a few units of 2^-24 of their size: far below the 4-bit error."""
    original, inputs = KINDS[kind][0](), walk(kind, steps=50)
    expected = run(inputs, recipe_of_layer(original, W8A4))
    for (_, a, o), step in zip(play(quantized(original, W8A4), inputs), expected, strict=True):
        bound = 50 * 8 * 2.0**-24
        assert_within(a, step.input_state, bound * float(step.input_state.abs().max()))
        assert_within(o, step.output_state, bound * 4 * float(step.output_state.abs().max()))


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
    (LayerConfig(modulation=ModulationConfig(state_dtype="int16"), execution="integer"), 0, 1e-3),
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
