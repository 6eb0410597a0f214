"""The recursion: equal to the float64 reference step by step, and the invariants of the method as properties."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modiff import LayerConfig, ModulationConfig, QuantizerConfig
from modiff.core.observers import MinMaxObserver
from modiff.core.predictors import Linear
from modiff.core.quantizer import Quantizer
from modiff.core.recursion import encode
from tests.core.loop import BIAS, WEIGHT, Affine, modulate
from tests.helpers import assert_same_bits, assert_within, drifting, worst
from tests.recipes import recipe_for
from tests.reference import recursion as reference
from tests.strategies import CLIPS, GAINS, modulation_configs, trajectories

SHAPE = (2, 2, 8)
RUNS = ((8,), (3, 5))
REACH = float(WEIGHT.abs().sum(1).max())  # largest change of an output for a change of 1 in every input


def double(**settings_) -> ModulationConfig:
    return ModulationConfig(state_dtype="float64", **settings_)


@st.composite
def settings_of_a_layer(draw: st.DrawFn, lowest: int = 0) -> tuple[QuantizerConfig, ModulationConfig]:
    bits = draw(st.sampled_from([b for b in (0, 2, 3, 4, 5, 8) if b >= lowest]))
    activation = QuantizerConfig(bits=bits, symmetric=draw(st.booleans()), clip=draw(CLIPS))
    modulation = draw(modulation_configs(activation))
    return activation, dataclasses.replace(modulation, state_dtype="float64")


# -------------------------------------------------------------------------------------------- against the reference


@given(
    inputs=trajectories(SHAPE),
    layer=settings_of_a_layer(),
    runs=st.sampled_from(RUNS),
    granularity=st.sampled_from(["tensor", "sample", "token", "input_channel"]),
    sizes=st.one_of(st.none(), st.lists(st.sampled_from([1.0, 10.0, 20.0, 35.0]), min_size=6, max_size=6)),
)
@settings(max_examples=80)
def test_codes_and_states_equal_the_reference_at_every_step(inputs, layer, runs, granularity, sizes):
    activation, modulation = layer
    config = LayerConfig(activation=activation, modulation=modulation)
    recipe = recipe_for(config, lambda x: x @ WEIGHT.T, BIAS, runs=runs, granularity=granularity)
    expected = reference.run(inputs, recipe, sizes)
    took = modulate(inputs, activation, modulation, runs=runs, granularity=granularity, sizes=sizes)
    for ours, theirs in zip(took, expected, strict=True):
        if theirs.sent is None:
            assert ours.update.codes == ()
        else:
            codes = torch.cat([codes for codes, _ in ours.update.codes[-1].parts], -1)
            assert_same_bits(codes, theirs.sent.codes.to(torch.int8))
        assert_within(ours.input.value, theirs.input_state, 1e-9)
        assert_within(ours.output.value, theirs.output_state, 1e-9)


def test_every_kind_of_step_sends_what_it_should():
    inputs = drifting(0, SHAPE, 5, 0.1)
    took = modulate(inputs, QuantizerConfig(bits=4), double(reanchor_every=3))
    assert [t.update.anchor is not None for t in took] == [True, False, False, True, False]
    assert [len(t.update.codes) for t in took] == [0, 1, 1, 0, 1]
    assert [t.update.starts for t in took] == [True, False, False, True, False]
    rounds = modulate(inputs, QuantizerConfig(bits=4), double(first_step="coded", rounds=3))
    assert [len(t.update.codes) for t in rounds] == [3, 1, 1, 1, 1]
    assert all(t.update.anchor is None for t in rounds)
    assert Linear().weights(1, 0.8, torch.tensor([7.0]))[0].tolist() == [1.0], "the gain stops at one"
    assert Linear().weights(1, 0.8, -1.0) == (0.0,)


# ------------------------------------------------------------------------------------------- invariants (methods 1.1)


@given(
    inputs=trajectories(SHAPE, max_steps=12),
    layer=settings_of_a_layer(),
    runs=st.sampled_from(RUNS),
    granularity=st.sampled_from(["tensor", "sample", "token", "input_channel"]),
)
@settings(max_examples=60)
def test_invariant_1_the_output_state_is_the_layer_at_the_input_state(inputs, layer, runs, granularity):
    activation, modulation = layer
    if modulation.error_compensation == "none":
        modulation = dataclasses.replace(modulation, error_compensation="closed_loop")
    for step in modulate(inputs, activation, modulation, runs=runs, granularity=granularity):
        assert_within(step.output.value, step.input.value @ WEIGHT.T + BIAS, 1e-9)


def test_a_sample_that_jumps_is_coded_from_zero_and_the_law_holds_with_its_anchor_at_zero():
    """ô = A_q(â) + b for it, where A(0) + b is known at no cost; the others keep what exact anchors corrected."""
    rounded = Affine(WEIGHT.round(decimals=1))
    rounded.anchor = Affine().anchor
    inputs = drifting(1, SHAPE, 3, 0.01)
    inputs[1][1] = -inputs[1][1] * 0.7  # further from its state than from zero
    for predictor in ("hold", "linear"):
        took = modulate(
            inputs, QuantizerConfig(bits=8), double(predictor=predictor), granularity="sample", operator=rounded
        )
        flags = [None if t.update.intra is None else t.update.intra.flatten().tolist() for t in took]
        assert flags == [None, [False, True], [False, True]]  # there and back
        codes, scale = took[1].update.codes[0].parts[0][0], took[1].update.codes[0].parts[0][1].scale
        assert float(scale[1]) == pytest.approx(float(inputs[1][1].abs().max()) / 127)
        assert int(codes[1].abs().max()) == 127
        anchors = torch.stack([inputs[0][0], torch.zeros_like(inputs[0][1])])
        law = took[1].input.value @ rounded.weight.T + anchors @ (WEIGHT - rounded.weight).T + BIAS
        assert_within(took[1].output.value, law, 1e-9)


@given(
    inputs=trajectories(SHAPE, max_steps=8),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    linear=st.booleans(),
    gain=GAINS,
)
def test_invariant_2_the_error_is_half_a_step_of_the_last_residual_s_grid(inputs, bits, symmetric, linear, gain):
    predictor = "linear" if linear and bits >= 4 else "hold"
    took = modulate(
        inputs,
        QuantizerConfig(bits=bits, symmetric=symmetric),
        double(predictor=predictor, gain=gain),
        granularity="sample",
    )
    for t in range(1, len(inputs)):
        prediction = took[t - 1].input.value
        if predictor == "linear" and t > 1:
            prediction = prediction + gain * (took[t - 1].input.value - took[t - 2].input.value)
        residual = (inputs[t] - prediction).flatten(1)
        if symmetric:
            step = residual.abs().amax(1) / (2 ** (bits - 1) - 1)
        else:
            step = (residual.amax(1).clamp_min(0) - residual.amin(1).clamp_max(0)) / (2**bits - 1)
        bound = (step / 2 * (1 + 1e-9))[:, None, None].expand(SHAPE)
        assert_within(took[t].input.value, inputs[t], bound)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_invariant_4_a_constant_input_is_reached_geometrically(bits):
    """|r_(n+1)| <= s_n / 2 = max|r_n| / (2 qmax): two times 2^(b-1) - 1 less at every step."""
    x = drifting(4, SHAPE, 1, 0.0)[0]
    took = modulate([x] * 8, QuantizerConfig(bits=bits), double(first_step="coded"))
    factor = 1 / (2 * (2 ** (bits - 1) - 1))
    for n, step in enumerate(took, 1):
        bound = float(x.abs().max()) * factor**n + 1e-12
        assert_within(step.input.value, x, bound)
        assert_within(step.output.value, x @ WEIGHT.T + BIAS, REACH * bound + 1e-11)
    assert worst(took[0].input.value, x) > 0.1 * float(x.abs().max()) * factor, "the first code must be off"


@pytest.mark.parametrize("reanchor_every", [0, 4])
@pytest.mark.parametrize(("bits", "first_step"), [(0, "full_precision"), (4, "full_precision"), (4, "coded")])
def test_invariant_5_the_bias_enters_once(first_step, reanchor_every, bits):
    silent = Affine(torch.zeros(5, 8, dtype=torch.float64))
    modulation = double(first_step=first_step, rounds=2, reanchor_every=reanchor_every)
    for step in modulate(drifting(5, SHAPE, 50, 0.3), QuantizerConfig(bits=bits), modulation, operator=silent):
        assert_same_bits(step.output.value.broadcast_to(2, 2, 5), BIAS.expand(2, 2, 5))


# --------------------------------------------------------------------------------------------------- single behaviours


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounds_of_the_first_step_contract_also_when_the_static_scale_is_stale(bits, dynamic):
    """Rounds on one static grid leave the anchor's error where it is; a fresh scale shrinks it."""
    x = drifting(8, SHAPE, 1, 0.0)[0]
    quantizer = Quantizer(QuantizerConfig(bits=bits, dynamic=dynamic), "tensor", -1, (8,))
    if not dynamic:
        quantizer.watch(MinMaxObserver)
        quantizer(100 * x)
        quantizer.freeze()
    factor = 1 / (2 * (2 ** (bits - 1) - 1))
    for rounds in range(1, 6):
        state = encode(x, None, quantizer, double(first_step="coded", rounds=rounds))[1]
        assert_within(state.value, x, float(x.abs().max()) * factor**rounds + 1e-12)


def test_the_first_state_is_a_copy_of_the_input():
    for compensation, dtype in (("closed_loop", torch.float32), ("none", torch.float16)):
        x = drifting(0, SHAPE, 1, 0.0, dtype)[0]
        kept = x.clone()
        config = ModulationConfig(error_compensation=compensation)
        _update, state = encode(x, None, Quantizer(QuantizerConfig(bits=4), "tensor", -1, (8,)), config)
        x.add_(1.0)
        assert_same_bits(state.value, kept.float())
