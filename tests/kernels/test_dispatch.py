"""The choice of a backend is a pure function; every machine can be made up."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch

from modiff import KernelError, ModiffWarning, errors
from modiff.kernels.dispatch import plan
from modiff.kernels.isa import Isa, Trust
from modiff.kernels.kernel import Kernel
from modiff.kernels.problem import Problem

CONV = {"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
LINEAR = Problem(1152, 1152)
PLAIN = Problem(320, 320, **CONV)


@pytest.mark.parametrize("level", ["amx", "avx512_vnni", "avx2_vnni"])
@pytest.mark.parametrize("problem", [LINEAR, PLAIN, dataclasses.replace(LINEAR, bits=3)])
def test_vnni_runs_full_range_codes_on_onednn(level, problem):
    choice = plan(problem, Isa(level))
    assert choice.backend == "onednn"
    assert level in choice.reason


@pytest.mark.parametrize("level", ["avx512", "avx2", "sse41"])
@pytest.mark.parametrize(
    ("bits", "weight_max", "backend"),
    [
        (8, 64, "onednn"),
        (8, 65, "float_exact"),
        (8, 127, "float_exact"),
        (8, 8, "onednn"),
        (7, 128, "onednn"),
        (4, 128, "onednn"),
    ],
)
def test_without_vnni_onednn_runs_only_what_cannot_saturate_16_bits(level, bits, weight_max, backend):
    for problem in (LINEAR, PLAIN):
        asked = dataclasses.replace(problem, bits=bits, weight_max=weight_max)
        choice = plan(asked, Isa(level))
        assert choice.backend == backend
        assert "16 bits" in choice.reason
        assert ("7-bit weights" in choice.reason) == (backend == "float_exact")


def test_a_machine_that_fails_the_self_test_is_not_trusted_whatever_it_says():
    full_only = Trust(bounded=True, full=False)
    assert plan(LINEAR, Isa("amx", trust=full_only)).backend == "float_exact"
    assert "failed the self-test" in plan(LINEAR, Isa("amx", trust=full_only)).reason
    assert plan(dataclasses.replace(LINEAR, bits=4), Isa("amx", trust=full_only)).backend == "onednn"
    nothing = Trust(bounded=False, full=False, detail="no primitive")
    for level in ("amx", "avx2"):
        choice = plan(dataclasses.replace(LINEAR, bits=4), Isa(level, trust=nothing))
        assert (choice.backend, "no primitive" in choice.reason) == ("float_exact", True)


def test_passing_the_self_test_does_not_replace_vnni():
    assert plan(LINEAR, Isa("avx2", trust=Trust(bounded=True, full=True))).backend == "float_exact"


@pytest.mark.parametrize(
    ("problem", "isa", "backend", "reason"),
    [
        (LINEAR, Isa("amx", onednn=False), "float_exact", "no oneDNN integer operators"),
        (PLAIN, Isa("amx", onednn=False), "reference", "inexact algorithm"),
        (
            Problem(64, 64, (1, 1), (1, 1), (0, 0), (1, 1)),
            Isa("amx", onednn=False),
            "float_exact",
            "no oneDNN integer operators",
        ),
        (LINEAR, Isa("other"), "float_exact", "x86"),
        (dataclasses.replace(LINEAR, device="xpu"), Isa("amx"), "reference", "xpu"),
        (dataclasses.replace(PLAIN, groups=4, inputs=32, outputs=64), Isa("amx"), "float_exact", "groups of 8 and 16"),
        (dataclasses.replace(PLAIN, groups=4, inputs=64, outputs=32), Isa("amx"), "float_exact", "groups of 16 and 8"),
        (dataclasses.replace(PLAIN, groups=4, inputs=64, outputs=64), Isa("amx"), "onednn", "oneDNN int8"),
        (dataclasses.replace(PLAIN, groups=64, inputs=64, outputs=64), Isa("amx"), "onednn", "oneDNN int8"),
        (dataclasses.replace(PLAIN, groups=64, inputs=64, outputs=128), Isa("amx"), "float_exact", "groups of 1 and 2"),
        (
            Problem(8, 8, (3, 3, 3), (1, 1, 1), (0, 0, 0), (1, 1, 1)),
            Isa("amx"),
            "float_exact",
            "at most two axes",
        ),
        (Problem(70000, 8), Isa("amx"), "reference", "may pass 32 bits"),
        (Problem(4, 4, (64, 64), (1, 1), (0, 0), (1, 1)), Isa("avx2"), "reference", "alone pass 2^24"),
    ],
)
def test_what_a_backend_cannot_run_goes_elsewhere_with_a_reason(problem, isa, backend, reason):
    choice = plan(problem, isa)
    assert choice.backend == backend
    assert reason in choice.reason


def test_the_reason_names_the_number_of_chunks():
    assert "exact in 2 chunks:" in plan(LINEAR, Isa("avx2")).reason
    assert "exact in 1 chunk:" in plan(dataclasses.replace(LINEAR, inputs=64), Isa("avx2")).reason


@pytest.mark.parametrize(("bits", "largest"), [(8, 255), (4, 15), (2, 3)])
def test_the_bound_of_the_sums_follows_the_bits(bits, largest):
    assert dataclasses.replace(LINEAR, bits=bits, weight_max=9).largest_sum == 1152 * largest * 9


def test_a_convolution_is_pointwise_only_where_it_is_a_matmul():
    one = {"kernel_size": (1, 1), "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
    assert Problem(4, 4, **one).pointwise
    assert not LINEAR.pointwise
    for change in ({"kernel_size": (1, 3)}, {"stride": (2, 1)}, {"padding": (0, 1)}, {"groups": 2}):
        assert not Problem(4, 4, **{**one, **change}).pointwise


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kernel_size": (3, 3)}, "for each of at most 3 axes"),
        ({"bits": 9}, "got 9 bits"),
        ({"bits": 1}, "got 1 bits"),
        ({"weight_max": 129}, "at most 128"),
        ({"groups": 5}, "groups that divide 1152"),
        ({"groups": 0}, "got 0"),
    ],
)
def test_a_problem_that_means_nothing_is_refused(fields, message):
    with pytest.raises(KernelError, match=message):
        dataclasses.replace(LINEAR, **fields)


BROKEN = {
    "a torch without the operators": (Isa("amx", onednn=False), "no oneDNN integer operators"),
    "a processor that oneDNN's kernels do not know": (Isa("other"), "need x86 with SSE4.1"),
    "operators of another signature": (Isa("amx", trust=Trust(False, False, "expected 13 arguments")), "13 arguments"),
    "sums that saturate against the processor's word": (Isa("amx", trust=Trust(True, False)), "failed the self-test"),
}


@pytest.fixture
def fresh(monkeypatch):
    """A process in which nobody was warned yet."""
    monkeypatch.setattr(errors, "_WARNED", set())


@pytest.mark.parametrize("case", BROKEN)
def test_a_slow_fallback_warns_once_and_says_what_to_do(case, fresh, monkeypatch):
    isa, cause = BROKEN[case]
    monkeypatch.setattr("modiff.kernels.dispatch.this_machine", lambda *_: isa)
    monkeypatch.setattr("modiff.kernels.kernel.this_machine", lambda *_: isa)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for inputs in (64, 64, 65):
            Kernel(Problem(inputs, 8), torch.ones(8, inputs, dtype=torch.int8), torch.ones(8))
    assert [w.category for w in seen] == [ModiffWarning]
    message = str(seen[0].message)
    assert cause in message
    assert "float_exact, more slowly than on onednn" in message
    assert "leave execution='simulated'" in message


def test_float64_sums_warn_whatever_the_machine(fresh, monkeypatch):
    monkeypatch.setattr("modiff.kernels.dispatch.this_machine", lambda *_: Isa("amx"))
    monkeypatch.setattr("modiff.kernels.kernel.this_machine", lambda *_: Isa("amx"))
    with pytest.warns(ModiffWarning, match="a layer runs on float64 sums, slow: a sum of 70000 products may pass 32"):
        Kernel(Problem(70_000, 2), torch.ones(2, 70_000, dtype=torch.int8), torch.ones(2))


@pytest.mark.parametrize("ask", ["plan", "VNNI", "no VNNI", "pretended", "forced"])
def test_what_is_as_fast_as_the_processor_allows_is_silent(ask, fresh, monkeypatch):
    isa = {"VNNI": Isa("amx"), "no VNNI": Isa("avx2")}.get(ask, Isa("other"))
    monkeypatch.setattr("modiff.kernels.dispatch.this_machine", lambda *_: isa)
    monkeypatch.setattr("modiff.kernels.kernel.this_machine", lambda *_: isa)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if ask == "plan":
            assert plan(LINEAR).backend == "float_exact"
            return
        options = {"pretended": {"isa": isa}, "forced": {"backend": "reference"}}.get(ask, {})
        Kernel(Problem(64, 8), torch.ones(8, 64, dtype=torch.int8), torch.ones(8), **options)
