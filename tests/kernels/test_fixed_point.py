"""Integer states: the law without any rounding of its own, over long trajectories."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modiff import KernelError
from modiff.kernels.encode import encode_residual, layout_of
from modiff.kernels.fixed_point import FixedState, encode_fixed, fixed_eagerly, start
from tests.helpers import assert_same_bits, drifting
from tests.kernels.problems import GRANULARITIES, none_clipped


def copy_of(state: FixedState) -> FixedState:
    return FixedState(state.n.clone(), state.grid)


def eagerly(x, state, bits, clip=1.0, granularity="tensor", *, channel_dim=-1, clipped=None):
    """`encode_fixed` by torch's operators."""
    layout = layout_of(x.shape, x.stride(), bits, clip, granularity, channel_dim)
    return fixed_eagerly(x, state, layout, none_clipped() if clipped is None else clipped)


BOTH = pytest.mark.parametrize("run", [encode_fixed, eagerly])


@pytest.mark.parametrize(("bits", "clip"), [(8, 1.0), (4, 0.4), (3, 0.25)])
@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_after_200_steps_the_state_is_what_was_sent_to_the_last_bit(bits, clip, granularity):
    inputs = [x.float() for x in drifting(bits, (3, 6, 40), 201, 0.1)]
    state = start(inputs[0])
    sent = state.value().double()
    for x in inputs[1:]:
        codes, scale = encode_fixed(x, state, bits, clip, granularity)
        sent = sent + (codes.double() - 2 ** (bits - 1)) * scale.double()  # exact: multiples of a power of two
    assert_same_bits(state.value().double(), sent)
    left = (1 / clip - 1) * (2 ** (bits - 1) - 1) + 1  # scales beyond the clip, and the rounding
    assert (x - state.value()).abs().max() <= left * scale.max()


@pytest.mark.parametrize("kind", [torch.float32, torch.int16, torch.bfloat16])
def test_rounded_states_drift_from_what_was_sent_in_200_steps_and_float32_and_integers_do_not(kind):
    """The output state sees the codes alone: what an input state rounds away, no later step repairs."""
    first, *inputs = (x.float() for x in drifting(5, (4, 64), 201, 0.1))
    state = start(first) if kind == torch.int16 else first.to(kind)
    now = state.value if isinstance(state, FixedState) else lambda: state
    sent, drifts = now().double(), []
    for x in inputs:
        if isinstance(state, FixedState):
            codes, scale = encode_fixed(x, state, 8, 1.0, "token")
        else:
            codes, scale = encode_residual(x, state, None, 8, granularity="token")
        sent = sent + (codes.double() - 128) * scale.double()
        drifts.append(float((now().double() - sent).norm() / sent.norm()))
    if kind == torch.bfloat16:
        assert drifts[-1] > max(5e-3, 1.5 * drifts[24])
    else:
        assert drifts[-1] < 1e-6


@given(
    seed=st.integers(0, 2**31),
    bits=st.integers(2, 8),
    clip=st.sampled_from([1.0, 0.4]),
    granularity=st.sampled_from(GRANULARITIES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    size=st.sampled_from([((3, 5, 33), -1), ((2, 6, 4, 5), 1), ((2, 20000), -1)]),
    jump=st.sampled_from([1.0, 1e-3, 50.0, 1e20]),
)
@settings(max_examples=60)
def test_the_compiled_loop_equals_torch_s_operators_bit_for_bit(seed, bits, clip, granularity, dtype, size, jump):
    shape, channel = size
    inputs = [x.to(dtype) for x in drifting(seed, shape, 4, 0.2)]
    if channel == 1:
        inputs = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
    state = start(inputs[0])
    other, needed = copy_of(state), state
    for x in (inputs[1], inputs[2] * jump, inputs[3]):
        needed = (x.float() - state.value()).abs().max() * (clip / (2 ** (bits - 1) - 1))
        codes, scale = encode_fixed(x, state, bits, clip, granularity, channel_dim=channel)
        expected, measured = eagerly(x, other, bits, clip, granularity, channel_dim=channel)
        for one, two in ((codes, expected), (scale, measured), (state.n, other.n)):
            assert_same_bits(one, two)
        multiples = scale / state.grid
        assert_same_bits(multiples, multiples.round().clamp(1, 2**14))
        assert multiples.max() == 2**14 or needed <= scale.max() <= needed * (1 + 1e-6) + state.grid


@pytest.mark.parametrize("headroom", [1.0, 8.0])
def test_the_grid_leaves_the_room_that_was_asked_for(headroom):
    x = torch.randn(4, 50)
    state = start(x, headroom)
    room = float(state.grid) * 32767 / float(x.abs().max())
    assert headroom <= room <= 2 * headroom * 1.001
    assert math.log2(float(state.grid)).is_integer()
    assert (state.value() - x).abs().max() <= state.grid / 2


@BOTH
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_nan_is_seen_in_the_scale_and_leaves_the_state(run, value):
    x, state = torch.randn(2, 40), start(torch.randn(2, 40))
    kept = copy_of(state)
    x[0, 3] = value
    codes, scale = run(x, state, 8, 1.0, "sample")
    assert scale.isnan().flatten().tolist() == [True, False]
    assert_same_bits(state.n[0], kept.n[0])
    assert_same_bits(codes[0], torch.full((40,), 128, dtype=torch.uint8))
    assert start(x).grid.isnan()


@BOTH
@pytest.mark.parametrize("multiple", [1, 2, 41, 61, 300])
@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("spare", [0, 1])
@pytest.mark.parametrize("sign", [1, -1])
def test_as_many_whole_steps_are_taken_as_fit_into_16_bits(run, multiple, steps, spare, sign):
    most, spare = 32767 if sign > 0 else 32768, min(spare, multiple - 1)
    n = torch.full((1, 2), sign * (most - steps * multiple - spare), dtype=torch.int16)
    state, clipped = FixedState(n, torch.tensor(2.0**-10)), none_clipped()
    x = state.value() + sign * 6.99 * multiple * state.grid  # seven steps of the scale
    codes, scale = run(x, state, 4, clipped=clipped)
    assert float(scale / state.grid) == multiple
    assert_same_bits(codes.int() - 8, torch.full((1, 2), sign * steps, dtype=torch.int32))
    assert_same_bits(state.n.int(), torch.full((1, 2), sign * (most - spare), dtype=torch.int32))
    assert int(clipped) == 2


def test_an_input_of_another_shape_is_refused():
    with pytest.raises(KernelError, match=r"expected an int16 state of shape \(2, 3\)"):
        encode_fixed(torch.randn(2, 3), start(torch.randn(2, 4)), 8)
