"""Norm, activation and codes in one, against states of every form: with moves, and in 16-bit integers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from modiff import KernelError
from modiff.kernels import native
from modiff.kernels.encode import encode_residual
from modiff.kernels.fixed_point import encode_fixed, start
from modiff.kernels.input_fusion import InputFusion
from tests.helpers import assert_same_bits, assert_within
from tests.kernels.coded import check


def fusions(seed: int) -> dict[str, tuple[Tensor, InputFusion, int, Tensor]]:
    """(x, what it passes through, axis of the channels, the exact y)."""
    torch.manual_seed(seed)
    pixels, tokens, both = torch.randn(3, 12, 41, 47), torch.randn(3, 101, 48), torch.randn(3, 101, 96)
    inner, (x, gate) = pixels.contiguous(memory_format=torch.channels_last), both.chunk(2, -1)
    weight, bias, each = torch.randn(12), torch.randn(12), torch.randn(2, 3, 48)
    norm = functional.group_norm(pixels.double(), 4, weight.double(), bias.double())
    turned = functional.group_norm(tokens.double().mT, 4).mT
    layer = functional.layer_norm(tokens.double(), (48,)) * each[0, :, None].double() + each[1, :, None].double()
    return {
        "group": (pixels, InputFusion("group", 4, weight, bias, 1e-5, "silu"), 1, functional.silu(norm)),
        "group, innermost": (inner, InputFusion("group", 4, weight, bias, 1e-5, "silu"), 1, functional.silu(norm)),
        "tokens": (tokens, InputFusion("group_last", 4, None, None, 1e-5), -1, turned),
        "layer": (tokens, InputFusion("layer", 1, each[0], each[1], 1e-5), -1, layer),
        "gated": (
            x,
            InputFusion("gated", weight=gate, activation="gelu"),
            -1,
            x.double() * functional.gelu(gate.double()),
        ),
        "activation": (tokens, InputFusion(activation="silu"), -1, functional.silu(tokens.double())),
    }


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("granularity", ["tensor", "sample", "token"])
@pytest.mark.parametrize("name", fusions(0))
def test_states_with_moves_behind_it(name, granularity, threads):
    x, fusion, axis, exact = fusions(1)[name]
    state = torch.empty_like(x).copy_(exact + 0.3 * torch.randn(x.shape))
    move = torch.empty_like(x).copy_(0.2 * torch.randn(x.shape))
    old, gain, had = state.clone(), torch.tensor(0.7), torch.get_num_threads()
    predicted = old + gain * move
    torch.set_num_threads(threads)
    try:
        found = fusion.encode(x, state, None, 8, 1.0, granularity, channel_dim=axis, move=move, gain=gain)
    finally:
        torch.set_num_threads(had)
    axes = {"tensor": tuple(range(x.dim())), "sample": tuple(range(1, x.dim())), "token": (axis % x.dim(),)}
    check(found, predicted, state, exact, 8, axes[granularity])
    assert_within(move, state.double() - old.double(), 1e-6 * (1 + state.abs().max()))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("granularity", ["tensor", "sample", "token"])
@pytest.mark.parametrize("name", fusions(0))
def test_integer_states_behind_it(name, granularity, threads):
    x, fusion, axis, exact = fusions(2)[name]
    state = start(torch.empty_like(x).copy_(exact + 0.3 * torch.randn(x.shape)))
    before, clipped, had = state.n.clone(), torch.zeros(1, dtype=torch.int32), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        codes, scale = fusion.encode(x, state, None, 8, 1.0, granularity, channel_dim=axis, clipped=clipped)
    finally:
        torch.set_num_threads(had)
    assert clipped.item() == 0
    axes = {"tensor": tuple(range(x.dim())), "sample": tuple(range(1, x.dim())), "token": (axis % x.dim(),)}
    needed = (exact - before.double() * state.grid).abs().amax(axes[granularity], keepdim=True) / 127
    wide = scale.reshape(needed.shape)
    multiples = wide / state.grid
    assert torch.equal(multiples, multiples.round())
    assert (multiples >= 1).all()
    assert_within(wide.double(), needed + state.grid / 2, state.grid / 2 + 1e-5 * (1 + needed))
    assert torch.equal(state.n.int(), before.int() + (codes.int() - 128) * multiples.int())
    error = (0.5001 * wide.double() + 4e-6 * (1 + exact.abs().max())).expand_as(exact)
    assert_within(state.value(), exact, error)


@pytest.mark.parametrize("form", ["moves", "integers"])
@pytest.mark.parametrize("granularity", ["tensor", "sample", "token"])
def test_behind_nothing_codes_and_states_are_those_of_the_input_side_bit_for_bit(form, granularity):
    x, state, gain = torch.randn(3, 70, 48), torch.randn(3, 70, 48), torch.tensor(0.6)
    if form == "moves":
        move = torch.randn(3, 70, 48)
        held, other = (state.clone(), move.clone()), (state.clone(), move.clone())
        found = InputFusion().encode(x, held[0], None, 6, 0.8, granularity, move=held[1], gain=gain)
        expected = encode_residual(x, other[0], None, 6, 0.8, granularity, move=other[1], gain=gain)
    else:
        held, other, cut = start(state, 0.5), start(state, 0.5), [torch.zeros(1, dtype=torch.int32) for _ in range(2)]
        found = InputFusion().encode(x, held, None, 6, 0.8, granularity, clipped=cut[0])
        expected = encode_fixed(x, other, 6, 0.8, granularity, clipped=cut[1])
        assert cut[0].item() == cut[1].item() > 0
    for ours, theirs in zip((*found, *held), (*expected, *other), strict=True):
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("form", ["moves", "integers"])
def test_states_that_lie_otherwise_and_no_compiler_take_torch_s_operators(form, monkeypatch):
    x, state, gain = torch.randn(2, 6, 48), torch.randn(2, 6, 48), torch.tensor(0.6)
    found = []
    for case in ("dense", "otherwise", "no compiler"):
        move, held = torch.full((2, 6, 48), 0.1), state.clone()
        if case == "otherwise":
            move = move.mT.contiguous().mT.mul_(torch.ones(2, 6, 48))
            held = held if form == "moves" else held.mT.contiguous().mT
        if case == "no compiler":
            monkeypatch.setattr(native, "load", lambda *_: native.Native(None, "no C++ compiler"))
        if form == "moves":
            codes, _ = InputFusion(activation="silu").encode(x, held, None, 8, move=move, gain=gain)
            found.append((codes, held, move))
        else:
            integers, clipped = start(held), torch.zeros(1, dtype=torch.int32)
            codes, _ = InputFusion(activation="silu").encode(x, integers, None, 8, clipped=clipped)
            found.append((codes, integers.value()))
    for other in found[1:]:
        assert (other[0].int() - found[0][0].int()).abs().max() <= 1
        for ours, theirs in zip(other[1:], found[0][1:], strict=True):
            assert_within(ours, theirs, 0.1)


@pytest.mark.parametrize("held", ["floats", "integers", "nothing"])
@pytest.mark.parametrize("mix", [{"move": torch.zeros(2, 3)}, {"gain": torch.tensor(1.0)},
                                 {"move": torch.zeros(2, 3), "gain": torch.tensor(1.0)},
                                 {"clipped": torch.zeros(1, dtype=torch.int32)}, {}],
                         ids=["move", "gain", "both", "clipped", "none"])  # fmt: skip
def test_what_does_not_belong_to_a_state_is_refused(held, mix):
    right = {"floats": (set(), {"move", "gain"}), "integers": ({"clipped"},), "nothing": (set(),)}[held]
    state = {"floats": torch.zeros(2, 3), "integers": start(torch.zeros(2, 3)), "nothing": None}[held]
    x = torch.randn(2, 3)
    if set(mix) in right:
        InputFusion(activation="silu").encode(x, state, None, 8, **mix)
        return
    with pytest.raises(KernelError, match=r"with .* state, got"):
        InputFusion(activation="silu").encode(x, state, None, 8, **mix)


@pytest.mark.parametrize("shape", [(1, 3), (2, 4)])
def test_moves_of_another_input_are_refused(shape):
    move, gain = torch.zeros(shape), torch.tensor(1.0)
    with pytest.raises(KernelError, match=r"expected a move of shape \(2, 3\), got"):
        InputFusion(activation="silu").encode(torch.randn(2, 3), torch.zeros(2, 3), None, 8, move=move, gain=gain)
    with pytest.raises(KernelError, match=r"of shape \(2, 3\), .* got \(2, 3\) and \("):
        encode_residual(torch.randn(2, 3), torch.zeros(2, 3), None, 8, move=move, gain=gain)


def test_integer_states_measure_their_scales():
    state, clipped = start(torch.zeros(2, 3)), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(KernelError, match=r"with .* state, got"):
        InputFusion(activation="silu").encode(torch.randn(2, 3), state, torch.tensor(0.1), 8, clipped=clipped)
