"""Norm, activation and codes in one: within float error of torch's operators one after the other; the law holds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from modiff import KernelError
from modiff.kernels import input_fusion, native
from modiff.kernels.input_fusion import InputFusion
from tests.helpers import assert_same_bits, assert_within
from tests.kernels.coded import ACTIVATIONS, active, check

needs_compiler = pytest.mark.skipif(native.find_compiler() is None, reason="needs a C++ compiler")


def shapes_and_layout(draw_size: tuple[int, ...], innermost: bool, dtype: torch.dtype, seed: int) -> Tensor:
    x = torch.randn(draw_size, generator=torch.Generator().manual_seed(seed)) * 2 + 1
    return (x.movedim(1, -1).contiguous().movedim(-1, 1) if innermost else x).to(dtype)


@given(
    seed=st.integers(0, 2**31),
    size=st.sampled_from([(2, 12, 5, 7), (1, 36, 9, 4), (3, 12, 50)]),
    groups=st.sampled_from([1, 4, 12]),
    activation=st.sampled_from(ACTIVATIONS),
    granularity=st.sampled_from(["tensor", "sample", "token"]),
    bits=st.sampled_from([4, 8]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    innermost=st.booleans(),
    affine=st.booleans(),
)
@settings(max_examples=40)
def test_group_norm_before_a_convolution(seed, size, groups, activation, granularity, bits, dtype, innermost, affine):
    x = shapes_and_layout(size, innermost, dtype, seed)
    weight, bias = (torch.randn(size[1]), torch.randn(size[1])) if affine else (None, None)
    wide = None if weight is None else weight.double()
    exact = active(functional.group_norm(x.double(), groups, wide, None if bias is None else bias.double()), activation)
    state = torch.empty_like(x, dtype=torch.float32)
    state.copy_(exact + 0.3 * torch.randn(size))
    before = state.clone()
    fusion = InputFusion("group", groups, weight, bias, 1e-5, activation)
    found = fusion.encode(x, state, None, bits, granularity=granularity, channel_dim=1)
    axes = {"tensor": tuple(range(x.dim())), "sample": tuple(range(1, x.dim())), "token": (1,)}[granularity]
    check(found, before, state, exact, bits, axes)
    assert found[0].stride() == x.stride()


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("granularity", ["tensor", "sample", "token"])
@pytest.mark.parametrize("size", [(2, 7, 12), (1, 3, 5, 24)])
def test_group_norm_of_tokens_is_that_of_pixels(size, granularity, dense):
    x = torch.randn(size) if dense else torch.randn(size[0], size[-1], *size[1:-1]).movedim(1, -1)
    weight, bias = torch.randn(size[-1]), torch.randn(size[-1])
    exact = functional.group_norm(x.double().movedim(-1, 1), 4, weight.double(), bias.double()).movedim(1, -1)
    fusion = InputFusion("group_last", 4, weight, bias, 1e-5)
    assert_within(fusion.compute(x), exact, 1e-5)
    state = (exact + 0.3 * torch.randn(size)).float().contiguous()
    before = state.clone()
    found = fusion.encode(x, state, None, 8, granularity=granularity)
    axes = {"tensor": tuple(range(x.dim())), "sample": tuple(range(1, x.dim())), "token": (x.dim() - 1,)}[granularity]
    assert found[1].shape == exact.amax(axes, keepdim=True).shape
    check(found, before, state, exact, 8, axes)
    codes, used = fusion.encode(x, before, found[1], 8, granularity=granularity)
    assert_same_bits(used, found[1])
    assert torch.equal(codes, found[0])
    assert_same_bits(before, state)


@given(
    seed=st.integers(0, 2**31),
    size=st.sampled_from([(2, 5, 48), (3, 40), (2, 3, 4, 33)]),
    activation=st.sampled_from(ACTIVATIONS),
    granularity=st.sampled_from(["tensor", "sample", "token"]),
    bits=st.sampled_from([4, 8]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    modulated=st.sampled_from(["no", "shared", "samples"]),
)
@settings(max_examples=60)
def test_layer_norm_and_its_modulation_before_a_linear_layer(
    seed, size, activation, granularity, bits, dtype, modulated
):
    x = shapes_and_layout(size, False, dtype, seed)
    each = {"no": None, "shared": (size[-1],), "samples": (size[0], size[-1])}[modulated]
    weight, bias = (None, None) if each is None else (1 + 0.5 * torch.randn(each), torch.randn(each))
    exact = functional.layer_norm(x.double(), size[-1:], eps=1e-6)
    if weight is not None and bias is not None:
        ones = [1] * (len(size) - 2) if modulated == "samples" else []
        lead = [size[0]] if modulated == "samples" else []
        exact = exact * weight.double().view(*lead, *ones, -1) + bias.double().view(*lead, *ones, -1)
    exact = active(exact, activation)
    state = (exact + 0.3 * torch.randn(size)).float()
    before = state.clone()
    fusion = InputFusion("layer", 1, weight, bias, 1e-6, activation)
    found = fusion.encode(x, state, None, bits, granularity=granularity)
    axes = {"tensor": tuple(range(x.dim())), "sample": tuple(range(1, x.dim())), "token": (x.dim() - 1,)}[granularity]
    check(found, before, state, exact, bits, axes)


@given(
    seed=st.integers(0, 2**31),
    size=st.sampled_from([(2, 5, 48), (1, 3, 7), (2, 3, 4, 33), (2, 40, 130)]),
    activation=st.sampled_from(ACTIVATIONS),
    granularity=st.sampled_from(["tensor", "sample", "token"]),
    bits=st.sampled_from([4, 8]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    halves=st.sampled_from(["one after the other", "swapped", "apart", "of another type"]),
)
@settings(max_examples=60)
def test_a_gate_before_a_linear_layer(seed, size, activation, granularity, bits, dtype, halves):
    both = shapes_and_layout((*size[:-1], 2 * size[-1]), False, dtype, seed)
    x, gate = both.chunk(2, -1) if halves == "one after the other" else both.chunk(2, -1)[::-1]
    if halves in ("apart", "of another type"):
        x, gate = x.contiguous(), gate.contiguous()
    if halves == "of another type":  # torch's operators
        gate = gate.double()
    exact = x.double() * active(gate.double(), activation)
    state = (exact + 0.3 * torch.randn(size)).float()
    before = state.clone()
    fusion = InputFusion("gated", weight=gate, activation=activation)
    found = fusion.encode(x, state, None, bits, granularity=granularity)
    axes = {"tensor": tuple(range(x.dim())), "sample": tuple(range(1, x.dim())), "token": (x.dim() - 1,)}[granularity]
    check(found, before, state, exact, bits, axes)
    assert found[0].is_contiguous()
    codes, scale = fusion.encode(x, None, None, bits, granularity=granularity)
    step = scale.double().reshape(exact.abs().amax(axes, keepdim=True).shape)
    error = 4e-6 * (1 + exact.abs().max())
    assert_within((codes.double() - 2 ** (bits - 1)) * step, exact, (0.501 * step + error).expand_as(exact))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", [(3, 7, 40), (2, 8, 6, 5), (50,)])
def test_an_activation_alone(activation, size):
    x = torch.randn(size) * 6
    exact, state = active(x.double(), activation), torch.zeros(size)
    found = InputFusion(activation=activation).encode(x, state, None, 8)
    check(found, torch.zeros(size), state, exact, 8, tuple(range(x.dim())))


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_activations_are_right_over_the_whole_range_and_keep_nan(activation):
    x = torch.cat([torch.linspace(-200, 200, 4001), torch.tensor([0.0, -0.0, 1e-40, 1e30, -1e30])]).reshape(1, -1)
    exact, state = active(x.double(), activation), torch.zeros_like(x)
    for shift in (0.0, 1.0):  # two rounds: the second codes what the first left, on a fine grid
        before = state.clone()
        scale = torch.full((1, 1), 2e-5) if shift else None
        if scale is None:
            scale = (exact.abs() / 127).float().clamp_min(1e-12)
            state.copy_(torch.round(exact / scale).clamp(-128, 127) * scale)
            continue
        InputFusion(activation=activation).encode(x, state, scale, 8, granularity="token")
        near = (exact - before.double()).abs() < 127 * 2e-5
        assert_within(state[near], exact[near], 1.01e-5 + 1e-6 * exact[near].abs())
    missing = torch.tensor([[1.0, float("nan")]])
    _, scale = InputFusion(activation=activation).encode(missing, torch.zeros(1, 2), None, 8)
    assert scale.isnan().all()


@pytest.mark.parametrize("innermost", [False, True])
def test_given_scales_are_used_and_returned(innermost):
    x = shapes_and_layout((2, 12, 5, 7), innermost, torch.float32, 0)
    for scale in (torch.tensor(0.05), torch.tensor([0.05, 0.2]).view(2, 1, 1, 1)):
        state = torch.zeros_like(x)
        fusion = InputFusion("group", 3, eps=1e-5, activation="silu")
        codes, used = fusion.encode(x, state, scale, 8, granularity="sample", channel_dim=1)
        assert_same_bits(used, scale)
        exact = functional.silu(functional.group_norm(x.double(), 3))
        assert_within(codes.double() - 128, exact / scale.double(), 0.501)


def test_large_means_cost_no_digits():
    x = torch.randn(2, 8, 6, 6) + 3000
    for layout in (torch.contiguous_format, torch.channels_last):
        value = x.contiguous(memory_format=layout)
        state = torch.zeros_like(value)
        fusion = InputFusion("group", 2, eps=1e-5)
        _, scale = fusion.encode(value, state, None, 8, granularity="sample", channel_dim=1)
        exact = functional.group_norm(x.double(), 2, eps=1e-5)
        assert_within(state, exact, (0.5 * scale + 2e-3).expand_as(exact))


def test_without_a_compiler_torch_s_operators_give_codes_at_most_one_apart(monkeypatch):
    x = torch.randn(2, 12, 5, 7)
    states = [torch.zeros_like(x) for _ in range(2)]
    fusion = InputFusion("group", 3, torch.randn(12), torch.randn(12), 1e-5, "silu")
    first, _ = fusion.encode(x, states[0], None, 8, granularity="sample", channel_dim=1)
    monkeypatch.setattr(native, "load", lambda *_: native.Native(None, "no C++ compiler"))
    second, _ = fusion.encode(x, states[1], None, 8, granularity="sample", channel_dim=1)
    assert (first.int() - second.int()).abs().max() <= 1
    assert_within(states[0], states[1], 0.05)


@needs_compiler
def test_with_a_compiler_the_compiled_loops_run(monkeypatch):
    slow: list[object] = []
    monkeypatch.setattr(input_fusion, "_normalized", lambda _, x: slow.append(x) or x.float())
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 12, 5, 7).contiguous(memory_format=layout)
        for dtype in (torch.float32, torch.bfloat16):
            for state in (torch.zeros_like(x), None):
                InputFusion("group", 3, eps=1e-5).encode(
                    x.to(dtype), state, None, 8, granularity="sample", channel_dim=1
                )
    InputFusion("layer", eps=1e-5).encode(torch.randn(2, 3, 8), torch.zeros(2, 3, 8), None, 8, granularity="token")
    InputFusion(activation="silu").encode(torch.randn(2, 3, 8), torch.zeros(2, 3, 8), None, 8, granularity="token")
    x, gate = torch.randn(2, 3, 16).chunk(2, -1)
    for dtype in (torch.float32, torch.bfloat16):
        fusion = InputFusion("gated", weight=gate.to(dtype), activation="gelu")
        fusion.encode(x.to(dtype), torch.zeros(2, 3, 8), None, 8, granularity="token")
    InputFusion("gated", weight=gate, activation="gelu").encode(x, None, None, 8, granularity="tensor")
    assert not slow  # torch's operators


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("batch", "granularity"), [(1, "sample"), (3, "sample"), (2, "token"), (2, "tensor")])
@pytest.mark.parametrize("innermost", [False, True])
def test_inputs_of_many_strips_on_one_thread_and_on_two(batch, granularity, innermost, threads):
    if granularity == "token" and not innermost:
        innermost = True  # a token's channels lie side by side
    x = shapes_and_layout((batch, 40, 47, 43), innermost, torch.float32, batch)
    weight, bias = torch.randn(40), torch.randn(40)
    exact = active(functional.group_norm(x.double(), 8, weight.double(), bias.double()), "silu")
    state = torch.empty_like(x).copy_(exact + 0.3 * torch.randn(x.shape))
    before, fusion, had = state.clone(), InputFusion("group", 8, weight, bias, 1e-5, "silu"), torch.get_num_threads()
    axes = {"tensor": (0, 1, 2, 3), "sample": (1, 2, 3), "token": (1,)}[granularity]
    torch.set_num_threads(threads)
    try:
        found = fusion.encode(x, state, None, 8, granularity=granularity, channel_dim=1)
        again = torch.empty_like(x).copy_(before)
        given, _ = fusion.encode(x, again, found[1], 8, granularity=granularity, channel_dim=1)
        plain, scale = fusion.encode(x, None, None, 8, granularity=granularity, channel_dim=1)
    finally:
        torch.set_num_threads(had)
    check(found, before, state, exact, 8, axes)
    assert_same_bits(given, found[0])
    assert_same_bits(again, state)
    assert_within((plain.double() - 128) * scale, exact, (0.501 * scale).expand_as(exact))


@given(
    seed=st.integers(0, 2**31),
    size=st.sampled_from([(2, 12, 5, 7), (1, 36, 9, 4), (3, 12, 50)]),
    cut=st.sampled_from([(5, 7), (1, 11), (8, 4)]),
    granularity=st.sampled_from(["tensor", "sample", "token"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=25)
def test_runs_of_channels_behind_one_group_norm_have_scales_and_states_of_their_own(
    seed, size, cut, granularity, dtype
):
    segments = (cut[0], size[1] - cut[0])
    x = shapes_and_layout(size, True, dtype, seed)
    weight, bias = torch.randn(size[1]), torch.randn(size[1])
    exact = active(functional.group_norm(x.double(), 4, weight.double(), bias.double()), "silu")
    parts = InputFusion("group", 4, weight, bias, 1e-5, "silu").split(x, segments)
    assert parts is not None
    axes = {"tensor": tuple(range(x.dim())), "sample": tuple(range(1, x.dim())), "token": (1,)}[granularity]
    for (part, fusion), true in zip(parts, exact.split(list(segments), 1), strict=True):
        state = torch.empty_like(true.movedim(1, -1).contiguous().movedim(-1, 1), dtype=torch.float32)
        state.copy_(true + 0.3 * torch.randn(true.shape))
        before = state.clone()
        found = fusion.encode(part, state, None, 8, granularity=granularity, channel_dim=1)
        check(found, before, state, true, 8, axes)
        again = fusion.compute(part)
        assert_within(again, true, 4e-6 * (1 + exact.abs().max()))
        assert found[0].movedim(1, -1).is_contiguous()


def test_parts_that_no_kernel_reads_are_left_to_the_caller(monkeypatch):
    fusion, x = InputFusion("group", 2, eps=1e-5), torch.randn(2, 4, 3, 3)
    assert fusion.split(x, (4,)) == [(x, fusion)]
    assert fusion.split(x, (1, 3)) is None  # channels are not innermost
    assert InputFusion(activation="silu").split(x.contiguous(memory_format=torch.channels_last), (1, 3)) is None
    monkeypatch.setattr(native, "load", lambda *_: native.Native(None, "no C++ compiler"))
    assert fusion.split(x.contiguous(memory_format=torch.channels_last), (1, 3)) is None


@pytest.mark.parametrize("size", [(2, 5, 1300), (1, 3, 70, 600)])
@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_long_rows_are_normalized_with_every_digit(size, mean):
    x = torch.randn(size) + mean
    state = torch.zeros(size)
    exact = functional.layer_norm(x.double(), size[-1:], eps=1e-6)
    _, scale = InputFusion("layer", eps=1e-6).encode(x, state, None, 8, granularity="token")
    assert_within(state, exact, (0.5001 * scale + 1e-6 * (1 + mean)).expand_as(exact))


def test_plain_codes_are_those_of_a_state_of_zeros():
    x, fusion = (
        torch.randn(2, 5, 48),
        InputFusion("layer", 1, torch.randn(2, 48), torch.randn(2, 48), 1e-6, "gelu_tanh"),
    )
    for scale in (None, torch.tensor(0.03)):
        first = fusion.encode(x, None, scale, 6, 0.7, "token")
        second = fusion.encode(x, torch.zeros_like(x), scale, 6, 0.7, "token")
        assert_same_bits(first[0], second[0])
        assert_same_bits(first[1], second[1])


def test_what_is_not_fused_is_refused():
    x = torch.randn(2, 3)
    with pytest.raises(KernelError, match="got 'none' and 'relu'"):
        InputFusion(activation="relu").encode(x, torch.zeros(2, 3), None, 8)
    with pytest.raises(KernelError, match=r"state of shape \(2, 3\), got \(3, 3\)"):
        InputFusion(activation="silu").encode(x, torch.zeros(3, 3), None, 8)
    with pytest.raises(KernelError, match="got 'input_channel'"):
        InputFusion(activation="silu").encode(x, torch.zeros(2, 3), None, 8, granularity="input_channel")


SLICED = {
    "tokens behind the first": ("layer", -1, lambda: torch.randn(2, 9, 24)[:, 1:]),
    "half of a chunk": ("none", -1, lambda: torch.randn(2, 9, 48).chunk(2, -1)[1]),
    "half of a chunk, one sample": ("layer", -1, lambda: torch.randn(1, 9, 48).chunk(2, -1)[0]),
    "one row for all samples": ("layer", -1, lambda: torch.randn(1, 9, 24).expand(3, -1, -1)),
    "tokens that were pixels": ("layer", -1, lambda: torch.randn(2, 24, 3, 4).flatten(2).transpose(1, 2)),
    "tokens that were pixels, one sample": ("layer", -1, lambda: torch.randn(1, 24, 12).transpose(1, 2)),
    "some channels": ("group", 1, lambda: torch.randn(2, 36, 5, 4)[:, :24]),
    "some channels, innermost": ("group", 1, lambda: torch.randn(2, 5, 4, 36).movedim(-1, 1)[:, 12:]),
    "height and width changed places": ("group", 1, lambda: torch.randn(2, 24, 5, 4).transpose(2, 3)),
    "every second row": ("group", 1, lambda: torch.randn(2, 24, 6, 4)[:, :, ::2]),
}


@pytest.mark.parametrize("granularity", ["tensor", "sample"])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("case", SLICED)
def test_an_input_that_does_not_lie_dense_in_memory_gives_what_its_copy_gives(case, plain, granularity):
    norm, axis, make = SLICED[case]
    x = make()
    fusion = InputFusion(norm, 4 if norm == "group" else 1, None, None, 1e-5, "silu")
    expected, state = fusion.compute(x.contiguous()), torch.randn(x.shape)
    held = None if plain else torch.empty_like(x, dtype=torch.float32).copy_(state)
    codes, scale = fusion.encode(x, held, None, 8, granularity=granularity, channel_dim=axis)
    residual = expected if plain else expected - state
    axes = tuple(range(x.dim())) if granularity == "tensor" else tuple(range(1, x.dim()))
    step = residual.abs().amax(axes, keepdim=True) / 127
    assert_within(scale.reshape(step.shape), step, 1e-5)
    value = (codes.float() - 128) * step
    assert_within(value, residual, (0.501 * step + 1e-5).expand_as(residual))
    if held is not None:
        assert_within(held, state + value, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_torch_takes_by_default_is_no_matter(dtype):
    x, weight = torch.randn(2, 24, 5, 4), torch.randn(24)
    fusion = InputFusion("group", 4, None, weight, 1e-5, "silu")
    expected = fusion.encode(x, torch.zeros_like(x), None, 8, channel_dim=1)
    torch.set_default_dtype(dtype)
    try:
        found = fusion.encode(x, torch.zeros_like(x), None, 8, channel_dim=1)
    finally:
        torch.set_default_dtype(torch.float32)
    for ours, theirs in zip(found, expected, strict=True):
        assert_same_bits(ours, theirs)
