"""The Triton kernels: sums, codes and states equal the reference's bit for bit. `test_dispatch.py` runs this file.

Triton decides when it is imported whether its interpreter runs the kernels, so these cases need a process of their own.
"""

import dataclasses

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from modiff.kernels.encode import encode_residual
from modiff.kernels.isa import detect
from modiff.kernels.kernel import Kernel
from modiff.kernels.problem import Problem
from modiff.kernels.triton.backend import TRITON
from tests.helpers import assert_same_bits, assert_within, drifting
from tests.kernels.problems import eagerly, exact_sums, operands, problems, sums_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def runs_here(problem: Problem) -> bool:
    return not TRITON.unsupported(dataclasses.replace(problem, device=DEVICE), detect())


@given(problem=problems(), seed=st.integers(0, 2**31), extreme=st.booleans(), inner=st.booleans())
@settings(max_examples=12, deadline=None, derandomize=True)
def test_sums_equal_loops_over_integers_bit_for_bit(problem, seed, extreme, inner):
    assume(runs_here(problem))
    codes, weight = operands(problem, seed, inner=inner, extreme=extreme)
    found = sums_of(problem, codes.to(DEVICE), weight.to(DEVICE), "triton")
    assert found.dtype == torch.int32
    assert_same_bits(found.double().cpu(), exact_sums(problem, codes, weight))


def test_sums_over_many_blocks_and_beyond_what_float32_holds():
    codes = torch.full((130, 1100), 255, dtype=torch.uint8, device=DEVICE)
    weight = torch.full((20, 1100), -128, dtype=torch.int8, device=DEVICE)
    weight[0, 0] = 1
    problem = Problem(1100, 20, bits=8, weight_max=128)
    found = sums_of(problem, codes, weight, "triton")
    assert int(found[3, 7]) == 127 * -128 * 1100
    assert int(found[129, 0]) == 127 * (-128 * 1099 + 1)


SHAPES = {
    "linear": (Problem(24, 10), (2, 5, 24)),
    "conv": (Problem(6, 9, (3, 3), (2, 1), (1, 2), (1, 2)), (2, 6, 7, 8)),
    "conv along one axis": (Problem(6, 4, (3,), (1,), (1,), (1,)), (2, 6, 9)),
    "conv of one pixel": (Problem(6, 4, (1, 1), (1, 1), (0, 0), (1, 1)), (2, 6, 4, 4)),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "each"), [(torch.float32, True), (torch.float16, False), (torch.bfloat16, True)])
def test_state_output_and_bias_are_dealt_with_in_one_kernel(shape, each, dtype):
    (problem, size), generator = SHAPES[shape], torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, size, generator=generator).to(torch.uint8).to(DEVICE)
    weight = torch.randint(-127, 128, problem.weight_shape, generator=generator).to(torch.int8).to(DEVICE)
    across, bias = torch.rand(2, problem.outputs, generator=generator).to(DEVICE) * 1e-3
    scale = (torch.rand(size[0], *[1] * (len(size) - 1)) if each else torch.tensor(0.3)).to(DEVICE)
    results = []
    for name in ("triton", "reference"):
        kernel = Kernel(problem, weight, across, backend=name)
        state = kernel.new_output(codes, dtype) + 0.5
        output = kernel.step(state, codes, scale, torch.bfloat16)
        assert output.dtype == torch.bfloat16
        results.append((state.float(), output.float(), kernel.compute(codes, scale, bias)))
    epsilon = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    for (ours, theirs), error in zip(zip(*results, strict=True), (epsilon, 1.6e-2, 1e-5), strict=True):
        assert_within(ours, theirs, error * float(theirs.abs().max()))


@pytest.mark.parametrize("whole", [8192, 8])
@pytest.mark.parametrize(("bits", "clip"), [(8, 1.0), (4, 0.7), (3, 0.4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_scales_and_states_equal_the_core_bit_for_bit(whole, bits, clip, dtype, monkeypatch):
    from modiff.kernels.triton import loops

    monkeypatch.setattr(loops, "_WHOLE", whole)  # 8: rows come in blocks, their scales from another kernel
    monkeypatch.setattr(loops, "_BLOCK", 16)
    x = drifting(bits, (6, 70), 1, 0.1, torch.float32)[0].to(dtype).to(DEVICE)
    held = drifting(bits + 1, (6, 70), 1, 0.1, torch.float32)[0].to(DEVICE)
    x[1], held[1] = 0, 0
    x[2, 5] = torch.nan
    for scale, granularity in ((None, "token"), (None, "tensor"), (torch.tensor(0.05, device=DEVICE), "tensor")):
        results = [
            (*run(x, s := held.clone(), scale, bits, clip, granularity)[:2], s) for run in (eagerly, encode_residual)
        ]
        for ours, theirs in zip(*results, strict=True):
            assert_same_bits(ours.nan_to_num(-7.0), theirs.nan_to_num(-7.0))


def test_ties_go_to_even_and_saturate_at_both_ends():
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 300.0, -300.0]], device=DEVICE)
    codes, *_ = encode_residual(x, None, torch.tensor(1.0, device=DEVICE), 4, granularity="tensor")
    assert (codes.int() - 8).tolist() == [[0, 2, 2, 0, -2, -2, 7, -8]]
