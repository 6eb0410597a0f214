"""The recursion: equal to the float64 reference step by step, and the invariants of the method as properties."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modiff import LayerConfig, ModulationConfig, QuantizerConfig
from modiff.core.observers import MinMaxObserver
from modiff.core.predictors import Linear
from modiff.core.quantizer import Quantizer
from modiff.core.recursion import encode, encode_plain, output_of
from tests.core.loop import BIAS, WEIGHT, Affine, modulate
from tests.helpers import assert_same_bits, assert_within, drifting, worst
from tests.recipes import recipe_for
from tests.reference import recursion as reference
from tests.strategies import CLIPS, GAINS, modulation_configs, trajectories

SHAPE = (2, 2, 8)
SEGMENTS = ((8,), (3, 5))
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
    segments=st.sampled_from(SEGMENTS),
    granularity=st.sampled_from(["tensor", "sample", "token", "input_channel"]),
    sizes=st.one_of(st.none(), st.lists(st.sampled_from([1.0, 10.0, 20.0, 35.0]), min_size=6, max_size=6)),
)
@settings(max_examples=80)
def test_codes_and_states_equal_the_reference_at_every_step(inputs, layer, segments, granularity, sizes):
    activation, modulation = layer
    config = LayerConfig(activation=activation, modulation=modulation)
    recipe = recipe_for(config, lambda x: x @ WEIGHT.T, BIAS, segments=segments, granularity=granularity)
    expected = reference.run(inputs, recipe, sizes)
    took = modulate(inputs, activation, modulation, segments=segments, granularity=granularity, sizes=sizes)
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
    nothing = modulate(inputs, QuantizerConfig(bits=0), double())
    assert [len(t.update.codes) for t in nothing] == [0] * 5
    assert all(torch.equal(t.output.value, nothing[0].output.value) for t in nothing)


# ------------------------------------------------------------------------------------------- invariants (methods 1.1)


@given(
    inputs=trajectories(SHAPE, max_steps=12),
    layer=settings_of_a_layer(),
    segments=st.sampled_from(SEGMENTS),
    granularity=st.sampled_from(["tensor", "sample", "token", "input_channel"]),
)
@settings(max_examples=60)
def test_invariant_1_the_output_state_is_the_layer_at_the_input_state(inputs, layer, segments, granularity):
    activation, modulation = layer
    if modulation.error_compensation == "none":
        modulation = dataclasses.replace(modulation, error_compensation="closed_loop")
    for step in modulate(inputs, activation, modulation, segments=segments, granularity=granularity):
        assert_within(step.output.value, step.input.value @ WEIGHT.T + BIAS, 1e-9)


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


def test_invariant_3_more_bits_converge_to_the_layer_in_full_precision():
    inputs = drifting(3, SHAPE, 10, 0.2)
    exact = [x @ WEIGHT.T + BIAS for x in inputs]
    errors = {}
    for bits in range(2, 9):
        took = modulate(inputs, QuantizerConfig(bits=bits), double())
        errors[bits] = max(worst(t.output.value, e) for t, e in zip(took, exact, strict=True))
    for bits in range(2, 8):
        assert errors[bits + 1] < 0.75 * errors[bits]
    assert errors[8] < errors[2] / 2**6


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


def test_invariant_6_a_coded_start_meets_the_exact_one_with_compensation_and_never_without():
    inputs = drifting(6, SHAPE, 12, 0.05)
    gaps: dict[str, list[float]] = {}
    for compensation in ("closed_loop", "none"):
        starts = [
            modulate(inputs, QuantizerConfig(bits=4), double(first_step=f, error_compensation=compensation))
            for f in ("full_precision", "coded")
        ]
        gaps[compensation] = [worst(b.output.value, a.output.value) for a, b in zip(*starts, strict=True)]
        if compensation == "closed_loop":  # both lie within half a step of a_t
            for t in range(3, 12):
                steps = [float(s[t].update.codes[0].parts[0][1].scale) for s in starts]
                assert gaps[compensation][t] <= REACH * sum(steps) / 2 + 1e-9
    assert gaps["closed_loop"][-1] < gaps["closed_loop"][0] / 4
    assert gaps["none"] == pytest.approx([gaps["none"][0]] * 12, rel=1e-9)  # the same codes follow both starts
    assert gaps["none"][0] > 0.1


# ------------------------------------------------------------------------------ figures of the study (methods 1.1)


@pytest.mark.parametrize(
    ("change", "bits", "plain", "open_mean", "open_last", "closed"),
    [
        (0.1, 4, 0.111, 0.073, 0.110, 0.0110),
        (0.1, 3, 0.239, 0.156, 0.232, 0.0241),
    ],
)
def test_the_toy_study_s_figures_come_out(change, bits, plain, open_mean, open_last, closed):
    """256 -> 128 linear layer, stationary input, one scale a sample, 100 steps: relative L2 error of the output."""
    inputs = drifting(11, (16, 256), 100, change, torch.float32)
    operator = Affine(torch.randn(128, 256) / 16, torch.zeros(128))
    activation = QuantizerConfig(bits=bits, symmetric=False)
    quantizer = Quantizer(activation, "sample", -1, (256,))

    def error(output: Tensor, x: Tensor) -> float:
        exact = x @ operator.weight.T
        return float((output - exact).norm() / exact.norm())

    errors: dict[str, list[float]] = {}
    for c in ("closed_loop", "none"):
        config = ModulationConfig(error_compensation=c)
        took = modulate(inputs, activation, config, operator=operator, quantizer=quantizer)
        errors[c] = [error(t.output.value, x) for t, x in zip(took, inputs, strict=True)][1:]
    no_memory = [error(output_of(encode_plain(x, quantizer), operator), x) for x in inputs]
    assert sum(no_memory) / 100 == pytest.approx(plain, rel=0.15)
    assert sum(errors["none"]) / 99 == pytest.approx(open_mean, rel=0.15)
    assert errors["none"][-1] == pytest.approx(open_last, rel=0.15)
    assert sum(errors["closed_loop"]) / 99 == pytest.approx(closed, rel=0.15)


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


def test_the_gain_follows_the_step_sizes_and_stops_at_one():
    linear = Linear()
    assert linear.weights(1, 0.8, 0.5) == pytest.approx((0.4,))
    assert linear.weights(1, 0.8, 2.0) == (1.0,)
    assert linear.weights(1, 0.8, torch.tensor([0.5]))[0].tolist() == pytest.approx([0.4])
    assert linear.weights(1, 0.8, torch.tensor([7.0]))[0].tolist() == [1.0]
    assert linear.weights(1, 0.8, -1.0) == (0.0,)
    assert linear.weights(0, 0.8, 1.0) == ()


def test_after_an_anchor_the_move_before_it_is_forgotten():
    inputs = drifting(10, SHAPE, 8, 0.3)
    took = modulate(inputs, QuantizerConfig(bits=4), double(predictor="linear", reanchor_every=4))
    fresh = modulate(inputs[4:], QuantizerConfig(bits=4), double(predictor="linear"))
    for again, first in zip(took[4:], fresh, strict=True):
        assert_same_bits(again.output.value, first.output.value)


def test_a_batch_permuted_is_the_result_permuted_with_a_scale_per_sample():
    inputs = drifting(12, (4, 3, 8), 6, 0.2)
    order = torch.tensor([2, 0, 3, 1])
    config = QuantizerConfig(bits=3)
    straight = modulate(inputs, config, double(), granularity="sample")
    permuted = modulate([x[order] for x in inputs], config, double(), granularity="sample")
    alone = modulate([x[1:2] for x in inputs], config, double(), granularity="sample")
    for a, b, c in zip(straight, permuted, alone, strict=True):
        assert_within(b.output.value, a.output.value[order], 1e-12)
        assert_within(c.output.value, a.output.value[1:2], 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_inputs_of_any_float_dtype_are_held_in_the_state_s_dtype(dtype):
    inputs = drifting(0, SHAPE, 3, 0.1, dtype)
    took = modulate(inputs, QuantizerConfig(bits=8), ModulationConfig())
    assert {t.input.value.dtype for t in took} | {t.output.value.dtype for t in took} == {torch.float32}
    assert_same_bits(took[0].input.value, inputs[0].float())


def test_the_first_state_is_a_copy_of_the_input():
    for compensation in ("closed_loop", "none"):
        x = drifting(0, SHAPE, 1, 0.0, torch.float32)[0]
        kept = x.clone()
        config = ModulationConfig(error_compensation=compensation)
        _update, state = encode(x, None, Quantizer(QuantizerConfig(bits=4), "tensor", -1, (8,)), config)
        x.add_(1.0)
        assert_same_bits(state.value, kept)
