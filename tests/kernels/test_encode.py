"""The fused input side: every implementation gives the core's codes, scales and states, bit for bit, in place."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modiff import KernelError, ModulationConfig, QuantizerConfig
from modiff.core.quantizer import Quantizer
from modiff.core.recursion import State, encode, encode_plain
from modiff.kernels import encode as module
from modiff.kernels import native
from modiff.kernels.encode import choose_encoder, encode_eagerly, encode_input, encode_residual, layout_of
from modiff.kernels.fixed_point import encode_fixed, start
from modiff.kernels.input_fusion import InputFusion
from modiff.kernels.layout import row_shape, scale_shape
from tests.helpers import assert_same_bits, drifting


def eagerly(x, state, scale, bits, clip=1.0, granularity="tensor", *, channel_dim=-1, move=None, gain=None):
    """`encode_residual` by torch's operators."""
    layout = layout_of(x.shape, x.stride(), bits, clip, granularity, channel_dim)
    return encode_eagerly(x.detach(), (state, move, gain), scale, layout)


ENCODERS = {"native": encode_residual, "eager": eagerly}
SHAPES = [((3, 40, 70), -1), ((5, 33), -1), ((2, 6, 9, 7), 1), ((2, 40, 33), 1), ((7,), -1)]

needs_compiler = pytest.mark.skipif(native.find_compiler() is None, reason="needs a C++ compiler")


def bits_of(x: Tensor) -> Tensor:
    """The bits of floats, with one pattern for all NaN."""
    return torch.where(x.isnan(), 0x7FC00000, x.view(torch.int32))


def assert_same_floats(actual: Tensor, expected: Tensor) -> None:
    """Bit for bit; NaN equals NaN."""
    assert_same_bits(bits_of(actual), bits_of(expected))


def core_codes(codes: Tensor, bits: int) -> Tensor:
    """The core's int8 codes as bytes."""
    return (codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)


@given(
    seed=st.integers(0, 2**31),
    shape=st.sampled_from(SHAPES),
    granularity=st.sampled_from(["tensor", "sample", "token"]),
    bits=st.integers(2, 8),
    clip=st.sampled_from([1.0, 0.45]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    innermost=st.booleans(),
    predictor=st.sampled_from(["hold", "linear"]),
)
@settings(max_examples=120)
def test_a_trajectory_of_codes_scales_and_states_equals_the_core_s(
    seed, shape, granularity, bits, clip, dtype, innermost, predictor
):
    size, channel = shape
    config = ModulationConfig(predictor=predictor, gain=0.7)
    quantizer = Quantizer(
        QuantizerConfig(bits=bits, granularity=granularity, clip=clip), granularity, channel, (size[channel],)
    )
    inputs = [x.to(dtype) for x in drifting(seed, size, 4, 0.2)]
    if innermost and len(size) > 2:
        inputs = [x.movedim(1, -1).contiguous().movedim(-1, 1) for x in inputs]
    ratio = torch.tensor(0.9)
    expected = State(inputs[0].float(), torch.zeros_like(inputs[0].float()) if predictor == "linear" else None)
    held = {name: [None if t is None else t.clone() for t in expected] for name in ENCODERS}
    for x in inputs[1:]:
        message, expected = encode(x, expected, quantizer, config, ratio)
        codes, qparams = message.codes[0].parts[0]
        for name, (state, move) in held.items():
            gain = None if move is None else torch.tensor(0.7) * ratio
            found, scale = ENCODERS[name](
                x, state, None, bits, clip, granularity, channel_dim=channel, move=move, gain=gain
            )
            assert_same_bits(found, core_codes(codes, bits))
            assert found.stride() == x.stride()
            assert_same_floats(scale, qparams.scale)
            assert_same_floats(state, expected.value)
            if move is not None:
                assert_same_floats(move, expected.move)


@pytest.mark.parametrize("granularity", ["tensor", "sample", "token"])
@pytest.mark.parametrize("given_as", ["one", "all"])
def test_given_scales_are_used_as_they_are(granularity, given_as):
    x = torch.randn(3, 5, 40)
    shape = scale_shape(x.shape, granularity, -1)
    scale = torch.rand(() if given_as == "one" else shape) * 0.3 + 0.05
    states = [torch.zeros_like(x) for _ in ENCODERS]
    codes = [ENCODERS[name](x, s, scale, 4, 0.1, granularity) for name, s in zip(ENCODERS, states, strict=True)]
    expected = torch.round(x / scale).clamp(-8, 7)
    for (found, used), state in zip(codes, states, strict=True):
        assert used is scale
        assert_same_bits(found, (expected + 8).to(torch.uint8))
        assert_same_floats(state, 0.0 + expected * scale)


@given(
    seed=st.integers(0, 2**31),
    shape=st.sampled_from(SHAPES),
    granularity=st.sampled_from(["tensor", "sample", "token"]),
    bits=st.integers(2, 8),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    given_scale=st.booleans(),
)
@settings(max_examples=60)
def test_plain_codes_equal_those_of_a_layer_without_memory(seed, shape, granularity, bits, dtype, given_scale):
    size, channel = shape
    quantizer = Quantizer(QuantizerConfig(bits=bits, granularity=granularity), granularity, channel, (size[channel],))
    (x,) = (t.to(dtype) for t in drifting(seed, size, 1, 0.2))
    codes, qparams = encode_plain(x, quantizer).codes[0].parts[0]
    scale = qparams.scale if given_scale else None
    found, used = encode_input(x, scale, bits, granularity=granularity, channel_dim=channel)
    assert_same_bits(found, core_codes(codes, bits))
    assert_same_bits(used, qparams.scale)


SPECIAL = [math.nan, math.inf, -math.inf, 1e-40, -1e-45, 3e38]


@pytest.mark.parametrize("implementation", ["native", "eager"])
@pytest.mark.parametrize("value", SPECIAL)
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_infinity_and_denormals_do_what_they_do_in_the_core(implementation, value, dynamic, dtype):
    torch.manual_seed(1)
    x = torch.randn(2, 40).to(dtype)
    x[0, 17], x[1, 0] = value, 1e-41
    state = torch.randn(2, 40)
    state[1, 0] = 3e-41
    config = QuantizerConfig(bits=8, granularity="sample", dynamic=True)
    message, expected = encode(x, State(state), Quantizer(config, "sample", -1, (40,)), ModulationConfig())
    codes, qparams = message.codes[0].parts[0]
    scale = None
    if not dynamic:
        scale = torch.full((2, 1), 0.01)
        residual = x.float() - state
        whole = torch.round(residual / scale).clamp(-128, 127).nan_to_num(0.0)
        codes, expected = whole.to(torch.int8), State(state + whole * scale)
    held = state.clone()
    found, used = ENCODERS[implementation](x, held, scale, 8, 1.0, "sample")
    assert_same_bits(found, core_codes(codes, 8))
    assert_same_floats(held, expected.value)
    if dynamic:
        assert_same_floats(used, qparams.scale)
        assert bool(held[0].isfinite().all()) == math.isfinite(value)
        assert bool(held[1].isfinite().all())
    else:
        assert bool(held.isfinite().all())


@pytest.mark.parametrize("native_library", [True, False])
def test_inputs_that_want_gradients_leave_no_graph_in_the_state(native_library, monkeypatch):
    if not native_library:
        monkeypatch.setattr(native, "load", lambda *_: native.Native(None, "none"))
    x, weight = torch.randn(2, 8, requires_grad=True), torch.nn.Parameter(torch.ones(8))
    state = torch.zeros(2, 8)
    encode_residual(x, state, None, 8)
    assert not state.requires_grad
    InputFusion("layer", 1, weight, weight, 1e-5).encode(x, state, None, 8, granularity="token")
    assert not state.requires_grad
    assert not encode_input(x, None, 8)[1].requires_grad
    fixed = start(x)
    assert not encode_fixed(x, fixed, 8)[1].requires_grad


def test_a_residual_of_zeros_codes_to_zeros_and_keeps_the_state():
    for name in ENCODERS:
        state = torch.randn(4, 8)
        kept = state.clone()
        codes, scale = ENCODERS[name](state.clone(), state, None, 4, granularity="token")
        assert_same_bits(codes, torch.full((4, 8), 8, dtype=torch.uint8))
        assert_same_bits(state, kept)
        assert bool((scale == torch.tensor(1e-12)).all())


@pytest.mark.parametrize("count", [16383, 16384, 16385, 70000])
def test_rows_longer_than_a_block_are_the_same_as_short_ones(count):
    x, state = torch.randn(2, count), torch.randn(2, count)
    for granularity in ("tensor", "sample"):
        states = [state.clone() for _ in ENCODERS]
        (codes, scale), (other, same) = (
            ENCODERS[name](x, s, None, 8, granularity=granularity) for name, s in zip(ENCODERS, states, strict=True)
        )
        assert_same_bits(codes, other)
        assert_same_bits(scale, same)
        assert_same_bits(states[0], states[1])


def test_layouts_without_rows_and_wide_states_run_on_the_core_s_own_functions():
    wide, x = torch.randn(3, 4, 6, dtype=torch.float64), torch.randn(3, 4, 6, dtype=torch.float64)
    strided = torch.randn(3, 6, 4).transpose(1, 2)
    for value, state in ((x, wide), (strided, torch.randn(3, 4, 6)), (x.float(), strided.clone())):
        states = [state.clone() for _ in ENCODERS]
        (codes, _), (other, _) = (
            ENCODERS[name](value, s, None, 8, granularity="token") for name, s in zip(ENCODERS, states, strict=True)
        )
        assert_same_bits(codes, other)
        assert_same_bits(states[0], states[1])


@pytest.mark.parametrize(
    ("shape", "innermost", "granularity", "channel", "rows"),
    [
        ((2, 3, 4), False, "tensor", -1, (1, 24)),
        ((2, 3, 4), False, "sample", -1, (2, 12)),
        ((2, 3, 4), False, "token", -1, (6, 4)),
        ((2, 3, 4, 5), True, "token", 1, (40, 3)),
        ((2, 3, 4, 5), True, "sample", 1, (2, 60)),
        ((2, 3, 4, 5), False, "token", 1, None),
        ((2, 3, 4, 5), True, "token", -1, None),
        ((2, 3, 4), False, "input_channel", -1, None),
        ((6,), False, "sample", -1, (1, 6)),
        ((0, 6), False, "sample", -1, None),
    ],
)
def test_rows_are_views_whose_order_is_that_of_the_scales(shape, innermost, granularity, channel, rows):
    x = torch.randn(shape)
    if innermost:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    found = row_shape(x.shape, x.stride(), granularity, channel)
    assert found == rows
    if found is None:
        return
    if granularity != "tensor":
        shared = [axis for axis, size in enumerate(scale_shape(shape, granularity, channel)) if size == 1 < shape[axis]]
        assert torch.allclose(x.as_strided(found, (found[1], 1)).mean(1), x.mean(shared).reshape(-1), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"granularity": "input_channel"}, "scale along the summed axis"),
        ({"granularity": "auto"}, "got 'auto'"),
        ({"state": torch.zeros(3, 4)}, r"state and move of shape \(2, 4\)"),
        ({"move": torch.zeros(2, 4)}, "both or neither"),
    ],
)
def test_what_has_no_integer_sums_is_refused(changes, message):
    options = {"state": torch.zeros(2, 4), "granularity": "tensor", "move": None, **changes}
    with pytest.raises(KernelError, match=message):
        encode_residual(
            torch.randn(2, 4), options["state"], None, 8, granularity=options["granularity"], move=options["move"]
        )


def test_without_a_library_the_choice_says_why_and_the_codes_are_the_same(monkeypatch):
    x, state = torch.randn(3, 50), torch.randn(3, 50)
    states = [state.clone() for _ in range(2)]
    first, _ = encode_residual(x, states[0], None, 4, granularity="token")
    monkeypatch.setattr(native, "load", lambda *_: native.Native(None, "no C++ compiler on the PATH"))
    assert choose_encoder().backend == "eager"
    assert "no C++ compiler on the PATH" in choose_encoder().reason
    second, _ = encode_residual(x, states[1], None, 4, granularity="token")
    assert_same_bits(first, second)
    assert_same_bits(states[0], states[1])


@needs_compiler
def test_with_a_compiler_the_compiled_loop_runs(monkeypatch):
    assert choose_encoder().backend == "native"
    monkeypatch.setattr(module, "encode_eagerly", lambda *_: pytest.fail("the eager path ran"))
    for x in (torch.randn(3, 50), torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)):
        channel = 1 if x.dim() == 4 else -1
        for granularity in ("tensor", "sample", "token"):
            for dtype in (torch.float32, torch.bfloat16):
                encode_residual(x.to(dtype), torch.zeros_like(x), None, 4, granularity=granularity, channel_dim=channel)
                encode_residual(x.to(dtype), torch.zeros_like(x), torch.tensor(0.1), 4, granularity=granularity)
                encode_input(x.to(dtype), None, 4, granularity=granularity, channel_dim=channel)


def test_other_devices_are_told_that_the_loop_is_for_cpus(monkeypatch):
    assert choose_encoder("xpu")[:2] == ("eager", "the compiled loop runs on CPUs, the input is on xpu")
    monkeypatch.setattr("modiff.kernels.triton.backend.installed", lambda: False)
    assert choose_encoder("cuda")[:2] == ("eager", "the compiled loop runs on CPUs, the input is on cuda")
    monkeypatch.setattr("modiff.kernels.triton.backend.installed", lambda: True)
    assert choose_encoder("cuda").backend == "triton"
