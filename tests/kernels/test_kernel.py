"""Every backend: equal sums, outputs and states within float error or bit for bit; weights that are prepared once."""

import dataclasses
import gc
import pickle

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from modiff import KernelError
from modiff.kernels import epilogue, native
from modiff.kernels.backend import Prepacked
from modiff.kernels.dispatch import this_machine
from modiff.kernels.encode import FixedState, start
from modiff.kernels.epilogue import add_eagerly, add_sent
from modiff.kernels.exact import FLOAT_EXACT
from modiff.kernels.kernel import Kernel, largest_weight_code
from modiff.kernels.onednn import ONEDNN
from modiff.kernels.problem import Problem
from modiff.kernels.product import NATIVE
from modiff.nn.weight import pack_nibbles
from tests.helpers import assert_same_bits, assert_within
from tests.kernels.problems import (
    along,
    exact_sums,
    needs_compiler,
    none_clipped,
    operands,
    problems,
    scales,
    sums_of,
)

EPSILON = 2.0**-24
"""Relative rounding error of float32."""


def exact_here(problem: Problem) -> list[str]:
    """The backends that dispatch may choose for the problem on this machine; slow groupings of oneDNN included."""
    isa, apart = this_machine(), dataclasses.replace(problem, groups=1)
    refusals = {"float_exact": FLOAT_EXACT.unsupported(problem, isa), "onednn": ONEDNN.unsupported(apart, isa)}
    refusals["native"] = NATIVE.unsupported(problem, isa._replace(level="avx2"))
    return ["reference", *(name for name, reason in refusals.items() if not reason)]


def bound(before: Tensor, sent: Tensor) -> Tensor:
    """Four roundings of the sent part and two of the state."""
    return EPSILON * (2 * before.double().abs() + 4 * sent.abs() + 2 * (before.double() + sent).abs()) + 1e-30


@given(problem=problems(), seed=st.integers(0, 2**31), extreme=st.booleans(), inner=st.booleans())
@settings(max_examples=80)
def test_the_sums_of_every_backend_equal_loops_over_integers_bit_for_bit(problem, seed, extreme, inner):
    codes, weight = operands(problem, seed, inner=inner, extreme=extreme)
    expected = exact_sums(problem, codes, weight)
    for backend in exact_here(problem):
        assert_same_bits(sums_of(problem, codes, weight, backend).double(), expected)
        if problem.weight_max == 7:  # fits four bits: two codes in a byte
            packed = pack_nibbles(weight)
            for _ in range(2):  # the second time from the remembered layout
                assert_same_bits(sums_of(problem, codes, packed, backend).double(), expected)


@given(
    problem=problems(), seed=st.integers(0, 2**31), kind=st.sampled_from(["one", "sample", "token"]),
    inner=st.booleans(), state_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
@settings(max_examples=100)
def test_states_take_scaled_sums_in_place_and_outputs_are_theirs_or_start_from_the_bias(
    problem, seed, kind, inner, state_dtype, dtype
):
    assume(kind != "token" or not problem.kernel_size or problem.pointwise)
    codes, weight = operands(problem, seed)
    torch.manual_seed(seed)
    weight_scale, scale = torch.rand(problem.outputs) + 0.1, scales(problem, codes, kind)
    per_output = (-1, *[1] * len(problem.kernel_size))
    sent = exact_sums(problem, codes, weight) * scale.double() * weight_scale.double().reshape(per_output)
    coarse = 2**-8 * 1.001  # of bfloat16, rounded once
    for backend in exact_here(problem):
        kernel = Kernel(problem, weight, weight_scale, backend=backend)
        floats = kernel.new_output(codes) + torch.randn(sent.shape)
        floats = floats if inner else floats.contiguous()
        if state_dtype == torch.int16:
            state, clipped = start(floats + sent.abs().max(), 4.0), none_clipped()
            before, error = state.value().double(), float(state.grid) / 2
            output, after = kernel.step(state, codes, scale, dtype, clipped), state.value()
            assert int(clipped) == 0
        else:
            after = floats.to(state_dtype)
            before, address = after.double(), after.data_ptr()
            kernel.accumulate(after, codes, scale)
            error = coarse * (before + sent).abs() if state_dtype == torch.bfloat16 else 0.0
            assert_within(after, before + sent, bound(before, sent) + error)
            before, output = after.double(), kernel.step(after, codes, scale, dtype)
            error = coarse * (before + sent).abs() if state_dtype == torch.bfloat16 else 0.0
            assert after.data_ptr() == address
        assert_within(after, before + sent, bound(before, sent) + error)
        if state_dtype != torch.bfloat16:
            assert_same_bits(output, after.to(dtype))
        assert output.data_ptr() != after.data_ptr()
        bias = torch.randn(problem.outputs)
        for known, first in ((bias, bias.reshape(per_output).expand(sent.shape)), (None, torch.zeros_like(sent))):
            made = kernel.compute(codes, scale, known)
            assert_within(made, first + sent, bound(first, sent))
            assert made.stride() == output.stride() == kernel.new_output(codes).stride()


@pytest.mark.parametrize("bits", [2, 4, 7, 8])
@pytest.mark.parametrize("weight_max", [8, 64, 128])
def test_sums_longer_than_float32_holds_are_cut_into_chunks_that_are_exact(bits, weight_max):
    for problem in (
        Problem(5000, 5, bits=bits, weight_max=weight_max),
        Problem(600, 4, **along(3, 3), bits=bits, weight_max=weight_max),
        Problem(1200, 8, (3,), (2,), (0,), (1,), groups=2, bits=bits, weight_max=weight_max),
    ):
        codes, weight = operands(problem, bits, extreme=True)
        expected = sums_of(problem, codes, weight, "reference")
        if not problem.kernel_size:
            assert_same_bits(expected, exact_sums(problem, codes, weight))
            whole = torch.nn.functional.linear(codes.float() - 2 ** (bits - 1), weight.float()).double()
            assert bits < 8 or weight_max < 128 or not torch.equal(whole, expected), "here, float32 does round"
        assert_same_bits(sums_of(problem, codes, weight, "float_exact").double(), expected)
        if "onednn" in exact_here(problem):
            assert_same_bits(sums_of(problem, codes, weight, "onednn"), expected.float())


def test_switching_onednn_off_in_torch_changes_no_sum_of_a_large_batch():
    """torch then takes Winograd's algorithm for float32, which is off by several units."""
    problem = Problem(64, 64, **along(3, 3), bits=8, weight_max=127)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (16, 64, 16, 16), generator=generator).to(torch.uint8)
    weight = torch.randint(-127, 128, problem.weight_shape, generator=generator).to(torch.int8)
    expected = sums_of(problem, codes, weight, "reference")
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        assert_same_bits(sums_of(problem, codes, weight, "float_exact").double(), expected)
    finally:
        torch._C._set_mkldnn_enabled(before)


BYTES = torch.zeros(2, 4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("weight", "scales", "state", "codes", "message"),
    [
        (torch.int8, 3, (1, 3), BYTES, r"state of shape \(2, 3\), got \(1, 3\)"),
        (torch.int8, 3, (2, 3), BYTES.char(), r"expected uint8 codes, got torch\.int8"),
        (torch.int8, 2, (2, 3), BYTES, r"shape \(3, 4\) with 3 scales, got torch.int8 of \(3, 4\) with 2"),
        (torch.float32, 3, (2, 3), BYTES, r"got torch\.float32"),
        (torch.uint8, 3, (2, 3), BYTES, r"shape \(3, 2\)"),
        (torch.int8, 3, start(torch.ones(2, 3)), BYTES, "expected `clipped` with an integer state .*, got none"),
        (torch.int8, 3, (2, 3), None, "`clipped` with an integer state .*, got one with a float state"),
    ],
)
def test_weights_states_and_codes_that_do_not_fit_are_refused(weight, scales, state, codes, message):
    def run() -> None:
        kernel = Kernel(Problem(4, 3), torch.zeros(3, 4, dtype=weight), torch.ones(scales))
        before = state if isinstance(state, FixedState) else torch.zeros(state)
        clipped = none_clipped() if codes is None else None
        kernel.step(before, BYTES if codes is None else codes, torch.tensor(1.0), clipped=clipped)

    with pytest.raises(KernelError, match=message):
        run()


def test_the_largest_weight_code_counts_the_lowest_one():
    for codes, dtype, largest in (([-128, 3], torch.int8, 128), ([5], torch.uint8, 8), ([], torch.int8, 8)):
        assert largest_weight_code(torch.tensor([codes], dtype=dtype)) == largest


@pytest.mark.parametrize("sizes", [(), (3, 3)])
def test_weights_and_scales_that_lie_apart_in_memory_are_read_as_they_are(sizes):
    problem = Problem(8, 4, **along(*sizes), bits=4, weight_max=7)
    codes, weight = operands(problem, 0)
    scale, one = torch.arange(1.0, 9.0).reshape(4, 2)[:, :1], torch.ones(())
    apart = torch.stack([weight, weight], -1)[..., 0]
    expected = Kernel(problem, weight, scale.clone()).compute(codes, one)
    assert_same_bits(Kernel(problem, apart, scale).compute(codes, one), expected)


@pytest.mark.parametrize("sizes", [(), (1,), (1, 1), (3, 3)])
def test_a_second_step_of_other_tensors_weights_or_types_is_that_of_a_new_kernel(sizes):
    problem = Problem(8, 4, **along(*sizes), bits=4, weight_max=7)
    codes, weight = operands(problem, 0)
    kernel = Kernel(problem, weight, torch.arange(1.0, 5.0))

    def same_step(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32, kernel: Kernel = kernel) -> None:
        outputs = []
        for each in (kernel, Kernel(problem, weight.clone(), torch.arange(1.0, 5.0))):
            state = each.new_output(codes).add_(0.5)
            outputs.append((each.step(state, codes, scale, dtype), state))
        assert_same_bits(*(output for output, _ in outputs))
        assert_same_bits(*(state for _, state in outputs))

    turned = codes.flip(0).transpose(0, -1).contiguous().transpose(0, -1)
    for each in (codes, codes, codes.flip(-1), torch.cat([codes, codes]), turned):
        same_step(each, torch.tensor(0.25))
    for dtype in (torch.bfloat16, torch.float16):
        same_step(codes, torch.tensor(0.5), dtype)
    same_step(codes, torch.tensor(0.5, dtype=torch.float64))
    same_step(codes, torch.rand(2, 1)[:, 0].mean())
    weight.neg_()
    same_step(codes, torch.tensor(0.25))
    copy = pickle.loads(pickle.dumps(kernel))
    assert not copy._prepared, "addresses of another kernel's memory"
    same_step(codes, torch.tensor(0.25), kernel=copy)


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


class Counted(Prepacked):
    """A store that counts how often something was made."""

    calls = 0

    def make(self) -> tuple[Tensor, ...]:
        self.calls += 1
        return (torch.zeros(10),)

    def ask(self, weight: Tensor, kind: str = "a") -> int:
        self.get(weight, kind, self.make)
        return self.calls


@pytest.mark.parametrize("inference", [False, True])
def test_one_memory_is_prepared_once_through_views_and_again_after_a_write_that_tensors_count(inference):
    store = Counted()
    with torch.inference_mode(inference):
        weight = torch.nn.Parameter(torch.ones(4, 3), requires_grad=False)
        assert {store.ask(same) for same in (weight, weight.detach(), weight.data, weight.view(4, 3))} == {1}
        assert [store.ask(weight, "b"), store.ask(weight.detach()[1:])] == [2, 3]
        weight.add_(1)
        assert [store.ask(weight), store.ask(weight)] == [3 + (not inference)] * 2


def test_nothing_outlives_the_weight_and_new_memory_at_its_address_is_not_taken_for_it():
    store, weight = Counted(), torch.ones(4, 3)
    store.get(weight, "b", lambda w=weight: store.get(w, "a", store.make))  # one tensor, counted once
    view = weight[1:]
    del weight
    gc.collect()
    assert store.bytes_held() == store.bytes_of(view) == 40
    del view
    gc.collect()
    assert store.bytes_held() == 0
    for _ in range(20):
        store.ask(torch.ones(4, 3))
    assert store.calls == 21
