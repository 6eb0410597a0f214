"""Codes, scales and states of an input: every implementation gives the core's, bit for bit, and writes in place."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modiff import KernelError, ModulationConfig, QuantizerConfig
from modiff.core import recursion
from modiff.core.affine import noise_of
from modiff.core.jumps import jumped
from modiff.core.quantizer import Quantizer
from modiff.core.recursion import State
from modiff.kernels import native, onednn
from modiff.kernels.encode import FixedState, encode_residual, start
from modiff.kernels.input_fusion import InputFusion
from modiff.kernels.kernel import Kernel
from modiff.kernels.layout import innermost
from modiff.kernels.problem import Problem
from tests.helpers import assert_same_bits, drifting
from tests.kernels.problems import BACKENDS, ENCODERS, GRANULARITIES, eagerly, none_clipped, on_threads

SHAPES = [((3, 40, 70), -1), ((5, 33), -1), ((2, 6, 9, 7), 1), ((2, 40, 33), 1), ((7,), -1)]


def assert_same_floats(actual: Tensor, expected: Tensor) -> None:
    """Bit for bit; one pattern stands for all NaN."""
    assert_same_bits(*(torch.where(x.isnan(), 0x7FC00000, x.view(torch.int32)) for x in (actual, expected)))


def core_codes(codes: Tensor, bits: int) -> Tensor:
    """The core's int8 codes as bytes."""
    return (codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("predictor", ["hold", "linear"])
@given(
    seed=st.integers(0, 2**31), shape=st.sampled_from(SHAPES), bits=st.integers(2, 8), clip=st.sampled_from([1.0,
    0.45]), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), inner=st.booleans(),
)  # fmt: skip
@settings(max_examples=16)
def test_codes_scales_and_states_equal_the_core_s_in_a_trajectory_and_without_a_state(
    granularity, predictor, seed, shape, bits, clip, dtype, inner
):
    size, channel = shape
    config = ModulationConfig(predictor=predictor, gain=0.7)
    settings_ = QuantizerConfig(bits=bits, granularity=granularity, clip=clip)
    quantizer = Quantizer(settings_, granularity, channel, (size[channel],))
    inputs = [x.to(dtype) for x in drifting(seed, size, 4, 0.2)]
    inputs = [innermost(x) for x in inputs] if inner and len(size) > 2 else inputs
    ratio = torch.tensor(0.9)
    first = inputs[0].float()
    expected = State(first, (torch.zeros_like(first),) if predictor == "linear" else ())
    states = {name: [x.clone() for x in (first, torch.zeros_like(first))] for name in ENCODERS}
    codes, qparams = recursion.encode_plain(inputs[0], quantizer).codes[0].parts[0]
    for run, given_scale in itertools.product(ENCODERS.values(), (None, qparams.scale)):
        found, scale, _ = run(inputs[0], None, given_scale, bits, clip, granularity, channel_dim=channel)
        assert_same_bits(found, core_codes(codes, bits))
        assert_same_floats(scale, qparams.scale)
    for x in inputs[1:]:
        held = None  # jumps are the loop's
        if predictor == "hold":
            held = [q for _, q in quantizer.fresh(x.float() - expected.value).parts]
            may = jumped(noise_of(held, (1,)), noise_of([quantizer.measured(x.float())], (1,))) is not None
        update, expected = recursion.encode(x, expected, quantizer, config, ratio, held)
        codes, qparams = update.codes[0].parts[0]
        for name, (state, move) in states.items():
            moves = {"move": move, "gain": torch.tensor(0.7) * ratio} if predictor == "linear" else {}
            found, scale, jumps = ENCODERS[name](x, state, None, bits, clip, granularity, channel_dim=channel, **moves)
            assert_same_bits(found, core_codes(codes, bits))
            assert found.stride() == x.stride()
            assert_same_floats(scale, qparams.scale)
            assert_same_floats(state, expected.value)
            assert jumps or predictor == "linear" or not may
            for moved in expected.moves:
                assert_same_floats(move, moved)


@pytest.mark.parametrize("run", ENCODERS.values())
@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize(("granularity", "size"), [("sample", 30), ("token", 30), ("sample", 20_000)])
def test_a_sample_may_jump_where_its_residual_is_as_large_as_its_value_and_nowhere_else(
    run, integers, granularity, size
):
    state, options = torch.randn(3, 4, size), {"granularity": granularity}
    state[2] = 0  # a silent sample needs no larger scales than a silent residual
    small = state + 0.1 * state.roll(1, -1)
    sample = small.clone()
    sample[1] = -state[1]
    clipped = none_clipped() if integers else None
    jumps = [run(x, start(state) if integers else state.clone(), None, 8, clipped=clipped, **options)[2]
             for x in (small, sample)]  # fmt: skip
    assert jumps[0] is False
    assert jumps[1] is True
    assert run(sample, state.clone(), torch.tensor(0.1), 8, **options)[2] is False  # given scales tell nothing


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e-40, -1e-45, 3e38])
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_infinity_and_denormals_do_what_they_do_in_the_core(encoder, value, dynamic, dtype):
    torch.manual_seed(1)
    x, state = torch.randn(3, 40).to(dtype), torch.randn(3, 40)
    x[0, 17], x[1, 0], state[1, 0] = value, 1e-41, 3e-41
    x[2] = state[2] = 0  # no scale is below 1e-12
    quantizer = Quantizer(QuantizerConfig(bits=8, granularity="sample", dynamic=True), "sample", -1, (40,))
    held = [q for _, q in quantizer.fresh(x.float() - state).parts]
    update, expected = recursion.encode(x, State(state), quantizer, ModulationConfig(), 1.0, held)
    codes, qparams = update.codes[0].parts[0]
    scale = None
    if not dynamic:
        scale = torch.full((3, 1), 0.01)
        whole = torch.round((x.float() - state) / scale).clamp(-128, 127).nan_to_num(0.0)
        codes, expected = whole.to(torch.int8), State(state + whole * scale)
    after = state.clone()
    found, used, _ = ENCODERS[encoder](x, after, scale, 8, 1.0, "sample")
    assert_same_bits(found, core_codes(codes, 8))
    assert_same_floats(after, expected.value)
    if dynamic:
        assert_same_floats(used, qparams.scale)
    assert bool(after[0].isfinite().all()) == (math.isfinite(value) or not dynamic)
    assert bool(after[1:].isfinite().all())


@pytest.mark.parametrize("compiler", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_and_biases_that_want_gradients_leave_no_graph_behind(compiler, backend, monkeypatch):
    if not compiler:
        monkeypatch.setattr(native, "load_library", lambda *_: native.Native(None, "none"))
    x, weight = torch.randn(2, 8, requires_grad=True), torch.nn.Parameter(torch.ones(8))
    state, integers = torch.zeros(2, 8), start(x)
    made = [encode_residual(x, state, None, 8), encode_residual(x, None, None, 8),
            encode_residual(x, integers, None, 8, clipped=none_clipped()),
            InputFusion("layer", 1, weight, weight, 1e-5).encode(x, state, None, 8, granularity="token")]  # fmt: skip
    kernel = Kernel(Problem(8, 8), torch.ones(8, 8, dtype=torch.int8), torch.ones(8), backend=backend)
    output = kernel.compute(*encode_residual(x, None, torch.tensor(0.1), 8)[:2], weight)
    assert not any(tensor.requires_grad for tensor in (state, *integers, *(scale for _, scale, _ in made), output))


@pytest.mark.parametrize("count", [native.BLOCK - 1, native.BLOCK, native.BLOCK + 1, 70000])
@pytest.mark.parametrize("granularity", ["tensor", "sample"])
def test_rows_longer_than_a_block_are_the_same_as_short_ones_on_any_number_of_threads(count, granularity):
    x, state = torch.randn(2, count), torch.randn(2, count)
    expected = (*eagerly(x, after := state.clone(), None, 8, granularity=granularity)[:2], after)
    for threads in (1, 2):
        with on_threads(threads):
            found = (*encode_residual(x, again := state.clone(), None, 8, granularity=granularity)[:2], again)
        for one, other in zip(found, expected, strict=True):
            assert_same_bits(one, other)


def test_layouts_without_rows_and_wide_states_run_on_the_core_s_own_functions():
    wide, strided = torch.randn(3, 4, 6, dtype=torch.float64), torch.randn(3, 6, 4).transpose(1, 2)
    for x, state in ((wide, wide + 1), (strided, torch.randn(3, 4, 6)), (wide.float(), strided.clone())):
        made = [(run(x, s := state.clone(), None, 8, granularity="token")[0], s) for run in ENCODERS.values()]
        for codes, after in made[1:]:
            assert_same_bits(codes, made[0][0])
            assert_same_bits(after, made[0][1])


ZEROS, ONE = torch.zeros(2, 3), torch.tensor(1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"granularity": "input_channel"}, "scale along the summed axis"),
        ({"state": torch.zeros(3, 3)}, r"a state of shape \(2, 3\), got \(3, 3\)"),
        ({"move": torch.zeros(1, 3), "gain": ONE}, r"a move of shape \(2, 3\), got \(1, 3\)"),
        ({"gain": ONE}, "with a float state, .* got state and gain"),
        ({"clipped": none_clipped()}, "got state and clipped"),
        ({"state": None, "move": ZEROS, "gain": ONE}, "no more than a scale with no state, got move and gain"),
        ({"state": start(ZEROS)}, "clipped alone with an integer state, .* got state and grid"),
        ({"state": start(ZEROS), "clipped": none_clipped(), "scale": ONE}, "got scale and state and grid and clipped"),
    ],
)
def test_what_has_no_integer_sums_or_belongs_to_another_input_is_refused(changes, message):
    options = {"state": ZEROS, "scale": None, "bits": 8} | changes
    for run in (encode_residual, InputFusion().encode):
        with pytest.raises(KernelError, match=message):
            run(torch.randn(2, 3), **options)


@pytest.mark.parametrize(("device", "dtype"), [("meta", torch.float32), ("cpu", torch.bfloat16)])
def test_what_torch_takes_by_default_is_no_matter(device, dtype):
    """Memory that kernels make for themselves lies where their inputs lie, and holds what the loops expect."""
    tokens, pixels, one = torch.randn(2, 3, 20_000), torch.randn(2, 24, 5, 4), torch.ones(())
    codes, weight, scales = torch.full((6, 12), 9).to(torch.uint8), torch.ones(5, 12).to(torch.int8), torch.rand(5)

    def everything() -> list[Tensor]:
        for cache in (onednn.self_test, onednn._one, onednn._zero_point):
            cache.cache_clear()
        return [
            *encode_residual(tokens, 0 * tokens, None, 8, granularity="sample")[:2],
            *encode_residual(tokens + 0.01, start(tokens), None, 8, clipped=none_clipped())[:2],
            *InputFusion("group", 4, None, scales.repeat(5)[:24], 1e-5).encode(pixels, None, None, 8, channel_dim=1)[
                :2
            ],
            Kernel(Problem(12, 5, bits=4), weight, scales).compute(codes, one),
        ]

    expected = everything()
    torch.set_default_device(device)
    torch.set_default_dtype(dtype)
    try:
        found = everything()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    for ours, theirs in zip(found, expected, strict=True):
        assert_same_bits(ours, theirs)


# --- states of 16-bit integers


@pytest.mark.parametrize(("bits", "clip"), [(8, 1.0), (4, 0.4), (3, 0.25)])
@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_after_200_steps_the_state_is_what_was_sent_to_the_last_bit(bits, clip, granularity):
    first, *inputs = (x.float() for x in drifting(bits, (3, 6, 40), 201, 0.1))
    state = start(first)
    sent = state.value().double()
    for x in inputs:
        codes, scale, _ = encode_residual(x, state, None, bits, clip, granularity, clipped=none_clipped())
        sent = sent + (codes.double() - 2 ** (bits - 1)) * scale.double()  # exact: multiples of a power of two
    assert_same_bits(state.value().double(), sent)
    left = (1 / clip - 1) * (2 ** (bits - 1) - 1) + 1  # scales beyond the clip, and the rounding
    assert (inputs[-1] - state.value()).abs().max() <= left * scale.max()


@given(
    seed=st.integers(0, 2**31), bits=st.integers(2, 8), clip=st.sampled_from([1.0, 0.4]),
    granularity=st.sampled_from(GRANULARITIES), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    size=st.sampled_from([((3, 5, 33), -1), ((2, 6, 4, 5), 1), ((2, 20000), -1)]),
    jump=st.sampled_from([1.0, 1e-3, 50.0, 1e20]),
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
        made = {name: (*ENCODERS[name](x, s, None, bits, clip, **options)[:2], s.n) for name, s in states.items()}
        for found in made.values():
            for one, other in zip(found, made["eager"], strict=True):
                assert_same_bits(one, other)
        scale = made["eager"][1]
        assert_same_bits(scale / grid, (scale / grid).round().clamp(1, 2**14))
        assert (scale / grid).max() == 2**14 or needed <= scale.max() <= needed * (1 + 1e-6) + grid


@given(
    seed=st.integers(0, 2**31), exponent=st.integers(-44, 38), count=st.sampled_from([1, 63, 40000]),
    special=st.sampled_from([0.0, 2.0**5, float("nan"), float("inf"), 3e38]), bf16=st.booleans(),
    headroom=st.sampled_from([1.0, 1.25, 2.0]),
)  # fmt: skip
@settings(max_examples=40)
def test_integers_start_alike_with_a_compiler_and_without_one(seed, exponent, count, special, bf16, headroom):
    torch.manual_seed(seed)
    x = torch.randn(count, 3).mul(10.0**exponent).t()
    x[0, 0] = special
    x = x.bfloat16() if bf16 else x
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(native.SWITCH, "off")
        patch.setattr(native, "load_library", native.load_library.__wrapped__)
        expected = start(x, headroom)
    state = start(x, headroom)
    assert_same_bits(state.n, expected.n)
    assert_same_bits(state.grid.nan_to_num(-1.0), expected.grid.nan_to_num(-1.0))
    assert state.n.stride() == x.stride()


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
    codes, scale, _ = run(x, FixedState(n, grid), None, 8, 1.0, "sample", clipped=none_clipped())
    assert scale.isnan().flatten().tolist() == [True, False]
    assert_same_bits(n[0], kept)
    assert_same_bits(codes[0], torch.full((40,), 128, dtype=torch.uint8))
    assert start(x).grid.isnan()


@pytest.mark.parametrize("run", ENCODERS.values())
def test_residuals_far_beyond_the_largest_multiple_are_cut_on_their_own_side(run):
    x = torch.tensor([[1e30, -1e30, 0.0, 1e-3]])
    for bits, expected in ((4, [9, 6, 7, 8]), (2, [3, 0, 1, 2])):
        state, clipped = start(torch.full((1, 4), 1e-3)), none_clipped()  # n = 8389: room for 1 and -2 times 2^14
        codes, scale, _ = run(x, state, None, bits, 1.0, "tensor", clipped=clipped)
        assert (scale / state.grid).item() == 2**14
        assert (codes.flatten().tolist(), clipped.item()) == (expected, 2 * (bits == 4))


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
    codes, scale, _ = run(x, state, None, 4, clipped=clipped)
    assert float(scale / state.grid) == multiple
    assert_same_bits(codes.int() - 8, torch.full((1, 2), sign * steps, dtype=torch.int32))
    assert_same_bits(state.n.int(), torch.full((1, 2), sign * (most - spare), dtype=torch.int32))
    assert int(clipped) == 2
