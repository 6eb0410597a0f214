"""The choice of a backend is a pure function, every machine can be made up; a slow choice is told once."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch

from modiff import KernelError, ModiffWarning, errors
from modiff.kernels import native
from modiff.kernels.dispatch import plan
from modiff.kernels.isa import Isa, Trust
from modiff.kernels.kernel import Kernel
from modiff.kernels.problem import Problem
from tests.kernels.problems import along

OFF = native.Native(None, "no compiler")

LINEAR, CONV = Problem(1152, 1152), Problem(320, 320, **along(3, 3))


def grouped(groups: int, inputs: int, outputs: int) -> Problem:
    return dataclasses.replace(CONV, groups=groups, inputs=inputs, outputs=outputs)


@pytest.mark.parametrize("level", ["amx", "avx512_vnni", "avx2_vnni"])
def test_vnni_runs_full_range_codes_on_onednn(level):
    for problem in (LINEAR, CONV, dataclasses.replace(LINEAR, bits=3)):
        backend, reason, _ = plan(problem, Isa(level))
        assert (backend, reason.partition(":")[0]) == ("onednn", f"oneDNN int8 on {level}, sums in 32 bits")


@pytest.mark.parametrize("level", ["avx512", "avx2"])
def test_without_vnni_the_compiled_loops_run_all_bits(level):
    for problem in (LINEAR, CONV, dataclasses.replace(LINEAR, bits=3), grouped(4, 64, 32)):
        assert plan(problem, Isa(level)).backend == "native"


@pytest.mark.parametrize("level", ["avx512", "avx2", "sse41"])
@pytest.mark.parametrize("trust", [Trust(bounded=True, full=False), Trust()])  # a test passed does not replace VNNI
@pytest.mark.parametrize(
    ("bits", "weight_max", "backend"),
    [(8, 64, "onednn"), (8, 65, "float_exact"), (8, 127, "float_exact"), (7, 128, "onednn"), (4, 128, "onednn")],
)
def test_without_vnni_onednn_runs_only_what_cannot_saturate_16_bits(
    level, trust, bits, weight_max, backend, monkeypatch
):
    monkeypatch.setattr(native, "load_library", lambda *_: OFF)
    for problem in (LINEAR, CONV):
        choice = plan(dataclasses.replace(problem, bits=bits, weight_max=weight_max), Isa(level, trust=trust))
        assert choice.backend == backend
        assert "16 bits" in choice.reason
        assert ("7-bit weights" in choice.reason) == (backend == "float_exact")


def test_a_machine_that_fails_the_self_test_is_not_trusted_whatever_it_says():
    full_only, nothing = Trust(bounded=True, full=False), Trust(bounded=False, full=False, detail="no primitive")
    few = dataclasses.replace(LINEAR, bits=4)
    assert plan(LINEAR, Isa("amx", trust=full_only)).backend == "float_exact"
    assert "failed the self-test" in plan(LINEAR, Isa("amx", trust=full_only)).reason
    assert plan(few, Isa("amx", trust=full_only)).backend == "onednn"
    for level in ("amx", "sse41"):
        choice = plan(few, Isa(level, trust=nothing))
        assert (choice.backend, "no primitive" in choice.reason) == ("float_exact", True)


@pytest.mark.parametrize(
    ("problem", "isa", "backend", "reason"),
    [
        (LINEAR, Isa("amx", onednn=False), "float_exact", "no oneDNN integer operators"),
        (CONV, Isa("amx", onednn=False), "reference", "inexact algorithm"),
        (Problem(64, 64, **along(1, 1)), Isa("amx", onednn=False), "float_exact", "no oneDNN integer operators"),
        (LINEAR, Isa("other"), "float_exact", "x86"),
        (LINEAR, Isa("sse41"), "float_exact", "exact in 2 chunks:"),
        (dataclasses.replace(LINEAR, inputs=64), Isa("sse41"), "float_exact", "exact in 1 chunk:"),
        (dataclasses.replace(LINEAR, device="xpu"), Isa("amx"), "reference", "xpu"),
        (grouped(4, 32, 64), Isa("amx"), "float_exact", "groups of 8 and 16"),
        (grouped(4, 64, 32), Isa("amx"), "float_exact", "groups of 16 and 8"),
        (grouped(4, 64, 64), Isa("amx"), "onednn", "oneDNN int8"),
        (grouped(64, 64, 64), Isa("amx"), "onednn", "oneDNN int8"),
        (grouped(64, 64, 128), Isa("amx"), "float_exact", "groups of 1 and 2"),
        (Problem(8, 8, **along(3, 3, 3)), Isa("amx"), "float_exact", "at most two axes"),
        (Problem(70000, 8), Isa("amx"), "reference", "may pass 32 bits"),
        (Problem(4, 4, **along(64, 64)), Isa("sse41"), "reference", "alone pass 2^24"),
    ],
)
def test_what_a_backend_cannot_run_goes_elsewhere_with_a_reason(problem, isa, backend, reason):
    choice = plan(problem, isa)
    assert choice.backend == backend
    assert reason in choice.reason
    assert all(sentence in choice.reason for _, sentence in choice.refusals)


@pytest.mark.parametrize(
    "fields", [{"kernel_size": (3, 3)}, {"bits": 9}, {"bits": 1}, {"weight_max": 129}, {"groups": 5}, {"groups": 0}]
)
def test_a_problem_that_means_nothing_is_refused(fields):
    with pytest.raises(KernelError, match="Problem: expected stride, padding and dilation for each"):
        dataclasses.replace(LINEAR, **fields)


def warned(monkeypatch: pytest.MonkeyPatch, machine: Isa, *sizes: int, **options: object) -> list[str]:
    """What a process on that machine says when kernels of these sizes are built, one after the other."""
    monkeypatch.setattr(errors, "_WARNED", set())
    monkeypatch.setattr("modiff.kernels.dispatch.this_machine", lambda *_: machine)
    monkeypatch.setattr("modiff.kernels.kernel.this_machine", lambda *_: machine)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for size in sizes:
            plan(Problem(size, 8))
            Kernel(Problem(size, 8), torch.ones(8, size, dtype=torch.int8), torch.ones(8), **options)
    assert all(warning.category is ModiffWarning for warning in seen)
    return [str(warning.message) for warning in seen]


@pytest.mark.parametrize(
    ("isa", "causes"),
    [
        (Isa("amx", onednn=False), ["no oneDNN integer operators"]),
        (Isa("other"), ["need x86 with SSE4.1"]),
        (Isa("amx", trust=Trust(False, False, "expected 13 arguments")), ["13 arguments"]),
        (Isa("amx", trust=Trust(True, False)), ["failed the self-test"]),
        (Isa("amx"), []),
        (Isa("avx2"), []),  # as fast as the processor allows
    ],
)
def test_a_slow_fallback_warns_once_and_says_what_to_do(isa, causes, monkeypatch):
    messages = warned(monkeypatch, isa, 64, 64, 65)
    assert len(messages) == len(causes)
    for message, cause in zip(messages, causes, strict=True):
        assert cause in message
        assert "float_exact, more slowly than on onednn" in message
        assert "leave execution='simulated'" in message


def test_float64_sums_warn_whatever_the_machine(monkeypatch):
    (message,) = warned(monkeypatch, Isa("amx"), 70_000, 70_001)
    assert "a layer runs on float64 sums, slow: a sum of 70000 products may pass 32" in message


@pytest.mark.parametrize("options", [{"isa": Isa("other")}, {"backend": "reference"}])
def test_what_was_asked_for_is_silent(options, monkeypatch):
    assert not warned(monkeypatch, Isa("other"), 64, **options)
