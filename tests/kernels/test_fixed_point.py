"""Integer states: the law without any rounding of its own, over long trajectories, by every implementation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modiff.kernels.encode import encode_residual
from modiff.kernels.fixed_point import FixedState, start
from tests.helpers import assert_same_bits, drifting
from tests.kernels.problems import ENCODERS, GRANULARITIES, none_clipped


@pytest.mark.parametrize(("bits", "clip"), [(8, 1.0), (4, 0.4), (3, 0.25)])
@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_after_200_steps_the_state_is_what_was_sent_to_the_last_bit(bits, clip, granularity):
    first, *inputs = (x.float() for x in drifting(bits, (3, 6, 40), 201, 0.1))
    state = start(first)
    sent = state.value().double()
    for x in inputs:
        codes, scale = encode_residual(x, state, None, bits, clip, granularity, clipped=none_clipped())
        sent = sent + (codes.double() - 2 ** (bits - 1)) * scale.double()  # exact: multiples of a power of two
    assert_same_bits(state.value().double(), sent)
    left = (1 / clip - 1) * (2 ** (bits - 1) - 1) + 1  # scales beyond the clip, and the rounding
    assert (inputs[-1] - state.value()).abs().max() <= left * scale.max()


@given(
    seed=st.integers(0, 2**31), bits=st.integers(2, 8), clip=st.sampled_from([1.0, 0.4]),
    granularity=st.sampled_from(GRANULARITIES), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    size=st.sampled_from([((3, 5, 33), -1), ((2, 6, 4, 5), 1), ((2, 20000), -1)]), jump=st.sampled_from([1.0, 1e-3,
    50.0, 1e20]),
)  # fmt: skip
@settings(max_examples=60)
def test_scales_are_multiples_of_the_grid_and_every_encoder_gives_the_same(
    seed, bits, clip, granularity, dtype, size, jump
):
    shape, channel = size
    inputs = [x.to(dtype) for x in drifting(seed, shape, 4, 0.2)]
    if channel == 1:
        inputs = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
    state, grid = start(inputs[0])
    states = {name: FixedState(state.clone(), grid) for name in ENCODERS}
    for x in (inputs[1], inputs[2] * jump, inputs[3]):
        needed = (x.float() - states["eager"].value()).abs().max() * (clip / (2 ** (bits - 1) - 1))
        options = {"granularity": granularity, "channel_dim": channel, "clipped": none_clipped()}
        made = {name: (*ENCODERS[name](x, s, None, bits, clip, **options), s.n) for name, s in states.items()}
        for found in made.values():
            for one, other in zip(found, made["eager"], strict=True):
                assert_same_bits(one, other)
        scale = made["eager"][1]
        assert_same_bits(scale / grid, (scale / grid).round().clamp(1, 2**14))
        assert (scale / grid).max() == 2**14 or needed <= scale.max() <= needed * (1 + 1e-6) + grid


@pytest.mark.parametrize("headroom", [1.0, 8.0])
def test_the_grid_leaves_the_room_that_was_asked_for(headroom):
    x = torch.randn(4, 50)
    state = start(x, headroom)
    room = float(state.grid) * 32767 / float(x.abs().max())
    assert headroom <= room <= 2 * headroom * 1.001
    assert math.log2(float(state.grid)).is_integer()
    assert (state.value() - x).abs().max() <= state.grid / 2


@pytest.mark.parametrize("run", ENCODERS.values())
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_nan_is_seen_in_the_scale_and_leaves_the_state(run, value):
    x, (n, grid) = torch.randn(2, 40), start(torch.randn(2, 40))
    x[0, 3], kept = value, n[0].clone()
    codes, scale = run(x, FixedState(n, grid), None, 8, 1.0, "sample", clipped=none_clipped())
    assert scale.isnan().flatten().tolist() == [True, False]
    assert_same_bits(n[0], kept)
    assert_same_bits(codes[0], torch.full((40,), 128, dtype=torch.uint8))
    assert start(x).grid.isnan()


@pytest.mark.parametrize("run", ENCODERS.values())
@pytest.mark.parametrize("multiple", [1, 2, 41, 61, 300])
@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("spare", [0, 1])
@pytest.mark.parametrize("sign", [1, -1])
def test_as_many_whole_steps_are_taken_as_fit_into_16_bits(run, multiple, steps, spare, sign):
    most, spare = 32767 if sign > 0 else 32768, min(spare, multiple - 1)
    n = torch.full((1, 2), sign * (most - steps * multiple - spare), dtype=torch.int16)
    state, clipped = FixedState(n, torch.tensor(2.0**-10)), none_clipped()
    x = state.value() + sign * 6.99 * multiple * state.grid  # seven steps of the scale
    codes, scale = run(x, state, None, 4, clipped=clipped)
    assert float(scale / state.grid) == multiple
    assert_same_bits(codes.int() - 8, torch.full((1, 2), sign * steps, dtype=torch.int32))
    assert_same_bits(state.n.int(), torch.full((1, 2), sign * (most - spare), dtype=torch.int32))
    assert int(clipped) == 2
