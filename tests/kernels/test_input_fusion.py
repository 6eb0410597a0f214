"""Norm, activation and codes in one: within float error of torch's operators one after the other; the law holds."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from modiff.kernels import encode, input_fusion, native
from modiff.kernels.encode import encode_residual, start
from modiff.kernels.input_fusion import InputFusion
from modiff.kernels.layout import innermost
from tests.helpers import assert_same_bits, assert_within
from tests.kernels.problems import GRANULARITIES, needs_compiler, none_clipped, on_threads

ACTIVATIONS = ("none", "silu", "gelu_tanh", "gelu")
KINDS = ("group", "group, innermost", "group_last", "layer", "layer, weighted", "layer, modulated", "gated",
         "gated, swapped", "gated, apart", "gated, of another type", "none")  # fmt: skip
PIXELS, TOKENS = ((2, 12, 5, 7), (1, 36, 9, 4), (3, 12, 50)), ((2, 5, 48), (1, 3, 12), (2, 3, 4, 36))


class Case(NamedTuple):
    """An input, what it passes through, the axis of its channels, and y in float64."""

    x: Tensor
    fusion: InputFusion
    axis: int
    exact: Tensor

    def shared(self, granularity: str) -> tuple[int, ...]:
        """The axes that share a scale."""
        axes = tuple(range(self.x.dim()))
        return {"tensor": axes, "sample": axes[1:], "token": (axes[self.axis],)}[granularity]

    def floats(self, around: float = 0.3) -> Tensor:
        """A state near y, laid in memory as codes are."""
        state = torch.empty_like(self.x, dtype=torch.float32)
        return state.copy_(self.exact + around * torch.randn(self.x.shape))


def case(kind: str, seed: int, activation: str = "silu", dtype: torch.dtype = torch.float32, size=None) -> Case:
    torch.manual_seed(seed)
    norm, _, variant = kind.partition(", ")
    size = size or (PIXELS if norm == "group" else TOKENS)[seed % 3]
    axis = 1 if norm == "group" else -1
    channels, groups = size[axis], (1, 4, 12)[seed // 3 % 3]
    x = (2 * torch.randn(size) + 1).to(dtype)
    weight = bias = None
    if norm == "gated":
        x, weight = (
            (2 * torch.randn(*size[:-1], 2 * channels)).to(dtype).chunk(2, -1)[:: -1 if "swap" in variant else 1]
        )
        if variant in ("apart", "of another type"):
            x, weight = x.contiguous(), weight.contiguous().to(torch.float64 if variant != "apart" else dtype)
    elif norm.startswith("group") or variant in ("weighted", "modulated"):
        each = (size[0], channels) if variant == "modulated" else (channels,)
        weight, bias = 1 + 0.5 * torch.randn(each), torch.randn(each)
    fusion = InputFusion(norm, groups if norm.startswith("group") else 1, weight, bias, 1e-5, activation)
    return Case(innermost(x) if variant == "innermost" else x, fusion, axis, fusion.compute(x.double()))


def check(codes: Tensor, scale: Tensor, predicted: Tensor, after: Tensor, exact: Tensor, bits: int, axes) -> None:
    """The scale, the codes and the state are those of y, up to the float error of a norm."""
    error = 4e-6 * (1 + exact.abs().max())
    largest = (exact - predicted.double()).abs().amax(axes, keepdim=True) / (2 ** (bits - 1) - 1)
    assert_within(scale, largest.reshape(scale.shape), 1e-5 * float(largest.max()) + error)
    value = (codes.double() - 2 ** (bits - 1)) * scale.double().reshape(largest.shape)
    assert_within(after, predicted.double() + value, 1e-6 * (1 + exact.abs().max()))
    assert_within(after, exact, (0.5001 * scale.double().reshape(largest.shape) + error).expand_as(exact))


@given(
    kind=st.sampled_from(KINDS), seed=st.integers(0, 2**31), activation=st.sampled_from(ACTIVATIONS),
    granularity=st.sampled_from(GRANULARITIES), bits=st.sampled_from([4, 8]), dtype=st.sampled_from([torch.float32,
    torch.bfloat16]), form=st.sampled_from(["no state", "state", "state and move"]),
    given_scale=st.sampled_from(["none", "one", "each"]),
)  # fmt: skip
@settings(max_examples=200)
def test_codes_scales_and_states_are_those_of_y(kind, seed, activation, granularity, bits, dtype, form, given_scale):
    it = case(kind, seed, activation, dtype)
    state = None if form == "no state" else it.floats()
    move = it.floats() * 0.2 if form == "state and move" else None
    gain, options = None if move is None else torch.tensor(0.7), {"granularity": granularity, "channel_dim": it.axis}
    old = torch.zeros(it.x.shape) if state is None else state.clone()
    predicted, qmax, scale = old if move is None or gain is None else old + gain * move, 2 ** (bits - 1) - 1, None
    if given_scale != "none":  # as large as it would be measured, for all or for each
        axes = it.shared("tensor" if given_scale == "one" else granularity)
        scale = ((it.exact - predicted).abs().amax(axes, keepdim=True) / qmax).float()
    codes, used, _ = it.fusion.encode(it.x, state, scale, bits, **options, move=move, gain=gain)
    after = predicted + (codes.float() - qmax - 1) * used if state is None else state
    assert scale is None or torch.equal(used, scale)
    check(codes, used, predicted, after, it.exact, bits, it.shared("tensor" if given_scale == "one" else granularity))
    if move is not None:
        assert_within(move, after.double() - old.double(), 1e-6 * (1 + after.abs().max()))
    assert codes.stride() == torch.empty_like(it.x).stride()


@pytest.mark.parametrize(
    ("kind", "size", "granularity"),
    [("group", (3, 40, 47, 43), "sample"), ("group, innermost", (1, 40, 47, 43), "sample"),
     ("group, innermost", (2, 40, 47, 43), "token"), ("group, innermost", (2, 40, 47, 43), "tensor"),
     ("layer, modulated", (2, 5, 1300), "token"), ("gated", (2, 300, 128), "sample")],
)  # fmt: skip
def test_inputs_of_many_strips_are_the_same_on_one_thread_and_on_two(kind, size, granularity):
    it, results = case(kind, 4, size=size), []
    options = {"granularity": granularity, "channel_dim": it.axis}
    state = it.floats()
    for threads in (1, 2):
        held, again = state.clone(), state.clone()
        integers, clipped = start(state), none_clipped()
        with on_threads(threads):
            codes, scale, _ = it.fusion.encode(it.x, held, None, 8, **options)
            same, used, _ = it.fusion.encode(it.x, again, scale, 8, **options)
            fixed = it.fusion.encode(it.x, integers, None, 8, **options, clipped=clipped)[:2]
        assert_same_bits(used, scale)
        assert_same_bits(same, codes)
        assert_same_bits(again, held)
        results.append((codes, scale, held, *fixed, integers.n))
    check(*results[0][:2], state, results[0][2], it.exact, 8, it.shared(granularity))
    for one, two in zip(*results, strict=True):
        error = 1 if one.dtype == torch.uint8 else 1e-3 * (1 + float(two.abs().max()))
        assert_within(one.double(), two.double(), error)


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_activations_are_right_over_the_whole_range_and_keep_nan(activation):
    x = torch.cat([torch.linspace(-200, 200, 4001), torch.tensor([0.0, -0.0, 1e-40, 1e30, -1e30])]).reshape(1, -1)
    exact, step = InputFusion(activation=activation).compute(x.double()), 2e-5
    coarse = (exact.abs() / 127).float().clamp_min(1e-12)
    state = (torch.round(exact / coarse).clamp(-128, 127) * coarse).float()  # what is left fits a fine grid
    near = (exact - state.double()).abs() < 127 * step
    InputFusion(activation=activation).encode(x, state, torch.full((1, 1), step), 8, granularity="token")
    assert_within(state[near], exact[near], 0.5 * step + 1e-7 + 1e-6 * exact[near].abs())
    missing = torch.tensor([[1.0, float("nan")]])
    assert InputFusion(activation=activation).encode(missing, torch.zeros(1, 2), None, 8)[1].isnan().all()


@pytest.mark.parametrize("kind", ["group", "group, innermost", "layer"])
def test_large_means_cost_no_digits(kind):
    x, axis = (torch.randn(2, 3, 1300) + 1000, -1) if kind == "layer" else (torch.randn(2, 8, 6, 6) + 3000, 1)
    x = innermost(x) if "innermost" in kind else x
    state = torch.zeros_like(x)
    exact = (functional.group_norm(x.double(), 2, eps=1e-5) if axis == 1
             else functional.layer_norm(x.double(), (1300,), eps=1e-5))  # fmt: skip
    fusion = InputFusion(kind[:5], 2 if axis == 1 else 1, eps=1e-5)
    _, scale, _ = fusion.encode(x, state, None, 8, granularity="sample", channel_dim=axis)
    assert_within(state, exact, (0.5001 * scale + 2e-3).expand_as(exact))


@needs_compiler
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gated, of another type"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_a_compiler_torch_s_operators_do_not_run_and_without_one_they_give_the_same(kind, dtype, monkeypatch):
    it, states = case(kind, 5, dtype=dtype), []
    for compiler in (True, False):
        state, integers, clipped = it.floats(0.0), start(it.floats(0.0)), none_clipped()
        with monkeypatch.context() as patch:
            if compiler:
                for module in (encode, input_fusion):
                    patch.setattr(module, "encode_eagerly", lambda *_: pytest.fail("torch's operators ran"))
            else:
                patch.setattr(native, "load_library", lambda *_: native.Native(None, "no C++ compiler"))
            it.fusion.encode(it.x, None, None, 8, granularity="sample", channel_dim=it.axis)
            it.fusion.encode(it.x, state, torch.tensor(0.1), 8, channel_dim=it.axis)
            it.fusion.encode(it.x, integers, None, 8, channel_dim=it.axis, clipped=clipped)
            if kind in ("none", "group, innermost"):
                encode_residual(it.x, it.floats(), None, 8, granularity="token", channel_dim=it.axis)
        states.append((state, integers.value()))
    for one, other in zip(*states, strict=True):
        assert_within(one, other.double(), 0.11)


@given(
    seed=st.integers(0, 2**31), granularity=st.sampled_from(GRANULARITIES), dtype=st.sampled_from([torch.float32,
    torch.bfloat16]), cut=st.sampled_from([5, 1, 11]),
)  # fmt: skip
@settings(max_examples=25)
@needs_compiler
def test_runs_of_channels_behind_one_group_norm_have_their_own_scales_and_states(seed, cut, granularity, dtype):
    it = case("group, innermost", seed, dtype=dtype)
    sizes = (cut, it.x.shape[1] - cut)
    runs = it.fusion.split(it.x, sizes)
    assert runs is not None
    for (x, fusion), exact in zip(runs, it.exact.split(list(sizes), 1), strict=True):
        state = innermost(exact.float() + 0.3 * torch.randn(exact.shape))
        before = state.clone()
        codes, scale, _ = fusion.encode(x, state, None, 8, granularity=granularity, channel_dim=1)
        check(codes, scale, before, state, exact, 8, it.shared(granularity))
        assert_within(fusion.compute(x), exact, 4e-6 * (1 + it.exact.abs().max()))
        assert codes.movedim(1, -1).is_contiguous()


SLICED = {
    "tokens behind the first": ("layer", -1, lambda: torch.randn(2, 9, 24)[:, 1:]),
    "half of a chunk": ("none", -1, lambda: torch.randn(2, 9, 48).chunk(2, -1)[1]),
    "one row for all samples": ("layer", -1, lambda: torch.randn(1, 9, 24).expand(3, -1, -1)),
    "tokens that were pixels": ("layer", -1, lambda: torch.randn(2, 24, 3, 4).flatten(2).transpose(1, 2)),
    "tokens that were pixels, grouped": ("group_last", -1, lambda: torch.randn(1, 24, 12).transpose(1, 2)),
    "some channels": ("group", 1, lambda: torch.randn(2, 36, 5, 4)[:, :24]),
    "some channels, innermost": ("group", 1, lambda: torch.randn(2, 5, 4, 36).movedim(-1, 1)[:, 12:]),
    "height and width changed places": ("group", 1, lambda: torch.randn(2, 24, 5, 4).transpose(2, 3)),
}


@pytest.mark.parametrize("stateless", [False, True])
@pytest.mark.parametrize("name", SLICED)
def test_an_input_that_does_not_lie_dense_in_memory_gives_what_its_copy_gives(name, stateless):
    norm, axis, make = SLICED[name]
    x = make()
    fusion = InputFusion(norm, 4 if "group" in norm else 1, None, None, 1e-5, "silu")
    exact, old = fusion.compute(x.contiguous()).double(), torch.zeros(x.shape) if stateless else torch.randn(x.shape)
    state = None if stateless else torch.empty_like(x).copy_(old)
    codes, scale, _ = fusion.encode(x, state, None, 8, granularity="sample", channel_dim=axis)
    after = (codes.float() - 128) * scale if state is None else state
    check(codes, scale, old, after, exact, 8, tuple(range(1, x.dim())))
