"""The output side in one pass: float and integer states, outputs in the model's dtype, what leaves 16 bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modiff.kernels import epilogue, native
from modiff.kernels.encode import start
from modiff.kernels.epilogue import add_eagerly, add_sent
from modiff.kernels.kernel import Kernel
from modiff.kernels.problem import Problem
from tests.helpers import assert_same_bits
from tests.kernels.problems import along, needs_compiler, none_clipped, operands, scales


@given(
    seed=st.integers(0, 2**31), integers=st.booleans(), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    rows=st.sampled_from([(), (4, 1), (1, 1)]), count=st.sampled_from([7, 64, 40000]), special=st.sampled_from([0.0,
    float("nan"), float("inf"), -1e30]),
)  # fmt: skip
@settings(max_examples=60)
def test_the_compiled_loop_equals_torch_s_operators(seed, integers, dtype, rows, count, special):
    torch.manual_seed(seed)
    sent, scale, value = torch.randn(4, count) * 50, torch.rand(rows) * 0.1, torch.randn(4, count)
    sent[1, 3] = special
    fixed, results = start(value, 4.0), []
    for run in (lambda *given: add_sent(*given[:4], 0, given[4]), add_eagerly):
        state, clipped = (fixed.n if integers else value).clone(), none_clipped()
        out = torch.empty(4, count, dtype=dtype)
        run(state, (fixed.grid, clipped) if integers else None, sent, scale, out)
        results.append((state.float(), clipped.float(), out))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one.isnan(), other.isnan())
        assert torch.equal(one.nan_to_num(0.0), other.nan_to_num(0.0))
    assert bool(results[0][2][1, 3].isnan()) == (special != special)


@pytest.mark.parametrize("compiled", [True, False])
def test_what_leaves_16_bits_is_cut_and_counted(compiled, monkeypatch):
    state, clipped, sent = start(torch.ones(2, 8), 2.0), none_clipped(), torch.zeros(2, 8)
    sent[0, :3], sent[1, 0] = 100.0, -100.0
    if not compiled:
        monkeypatch.setattr(native, "load_library", lambda *_: native.Native(None, "no C++ compiler"))
    add_sent(state.n, (state.grid, clipped), sent, torch.tensor(1.0), 0, torch.empty(2, 8))
    assert (int(clipped), int(state.n.max()), int(state.n.min())) == (4, 32767, -32768)


@needs_compiler
@pytest.mark.parametrize(("sizes", "kind"), [((), "sample"), ((), "token"), ((3, 3), "sample")])
@pytest.mark.parametrize("backend", ["float_exact", "onednn"])
def test_with_a_compiler_the_compiled_loop_runs_and_without_one_steps_are_the_same(sizes, kind, backend, monkeypatch):
    problem = Problem(12, 10, **along(*sizes), bits=4)
    codes, weight = operands(problem, 0)
    kernel, scale = Kernel(problem, weight, torch.ones(10), backend=backend), scales(problem, codes, kind)
    with monkeypatch.context() as patch:
        patch.setattr(epilogue, "add_eagerly", lambda *_: pytest.fail("torch's operators ran"))
        first = kernel.step(kernel.new_output(codes), codes, scale, torch.bfloat16)
    monkeypatch.setattr(native, "load_library", lambda *_: native.Native(None, "no C++ compiler"))
    assert_same_bits(kernel.step(kernel.new_output(codes), codes, scale, torch.bfloat16), first)
