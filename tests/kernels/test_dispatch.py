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

LINEAR, CONV = Problem(1152, 1152), Problem(320, 320, **along(3, 3))
FEW = dataclasses.replace(LINEAR, bits=4)
AMX, FULL_ONLY, UNTRUSTED = Isa("amx"), Trust(bounded=True, full=False), Trust(False, False, detail="no primitive")


def grouped(groups: int, inputs: int, outputs: int) -> Problem:
    return dataclasses.replace(CONV, groups=groups, inputs=inputs, outputs=outputs)


@pytest.mark.parametrize("level", ["avx512", "avx2", "sse41"])
@pytest.mark.parametrize("trust", [FULL_ONLY, Trust()])  # a test passed does not replace VNNI
@pytest.mark.parametrize(
    ("bits", "weight_max", "backend"),
    [(8, 64, "onednn"), (8, 65, "float_exact"), (8, 127, "float_exact"), (7, 128, "onednn"), (4, 128, "onednn")],
)
def test_without_vnni_onednn_runs_only_what_cannot_saturate_16_bits(
    level, trust, bits, weight_max, backend, monkeypatch
):
    monkeypatch.setattr(native, "load_library", lambda *_: native.Native(None, "no compiler"))
    for problem in (LINEAR, CONV):
        choice = plan(dataclasses.replace(problem, bits=bits, weight_max=weight_max), Isa(level, trust=trust))
        assert choice.backend == backend
        assert "16 bits" in choice.reason
        assert ("7-bit weights" in choice.reason) == (backend == "float_exact")


@pytest.mark.parametrize(
    ("problem", "isa", "backend", "reason"),
    [
        *((problem, Isa(level), "onednn", f"oneDNN int8 on {level}, sums in 32 bits")
          for level in ("amx", "avx512_vnni", "avx2_vnni") for problem in (LINEAR, CONV, FEW)),
        *((problem, Isa(level), "native", "") for level in ("avx512", "avx2")
          for problem in (LINEAR, CONV, FEW, grouped(4, 64, 32))),
        (LINEAR, Isa("amx", trust=FULL_ONLY), "float_exact", "failed the self-test"),
        (FEW, Isa("amx", trust=FULL_ONLY), "onednn", ""),
        (FEW, Isa("amx", trust=UNTRUSTED), "float_exact", "no primitive"),
        (FEW, Isa("sse41", trust=UNTRUSTED), "float_exact", "no primitive"),
        (LINEAR, Isa("amx", onednn=False), "float_exact", "no oneDNN integer operators"),
        (CONV, Isa("amx", onednn=False), "reference", "inexact algorithm"),
        (Problem(64, 64, **along(1, 1)), Isa("amx", onednn=False), "float_exact", "no oneDNN integer operators"),
        (LINEAR, Isa("other"), "float_exact", "x86"),
        (LINEAR, Isa("sse41"), "float_exact", "exact in 2 chunks:"),
        (dataclasses.replace(LINEAR, inputs=64), Isa("sse41"), "float_exact", "exact in 1 chunk:"),
        (dataclasses.replace(LINEAR, device="xpu"), AMX, "reference", "xpu"),
        (grouped(4, 32, 64), AMX, "float_exact", "groups of 8 and 16"),
        (grouped(4, 64, 32), AMX, "float_exact", "groups of 16 and 8"),
        (grouped(4, 64, 64), AMX, "onednn", "oneDNN int8"),
        (grouped(64, 64, 64), AMX, "onednn", "oneDNN int8"),
        (grouped(64, 64, 128), AMX, "float_exact", "groups of 1 and 2"),
        (Problem(8, 8, **along(3, 3, 3)), AMX, "float_exact", "at most two axes"),
        (Problem(64, 64, device="cuda"), AMX, "triton", "Triton, sums in 32 bits"),
        (Problem(8, 8, **along(3, 3), groups=2, device="cuda"), AMX, "reference", "grouped convolutions have no"),
        (Problem(8, 8, **along(3, 3, 3), device="cuda"), AMX, "reference", "three axes"),
        (Problem(200_000, 8, device="cuda"), AMX, "reference", "may pass 32 bits"),
        (Problem(70000, 8), AMX, "reference", "may pass 32 bits"),
        (Problem(4, 4, **along(64, 64)), Isa("sse41"), "reference", "alone pass 2^24"),
    ],
)  # fmt: skip
def test_the_fastest_backend_that_is_exact_runs_a_layer_and_says_why_no_other_does(problem, isa, backend, reason):
    choice = plan(problem, isa)
    assert choice.backend == backend
    assert reason in choice.reason
    assert backend in ("onednn", "native") or all(sentence in choice.reason for _, sentence in choice.refusals)


@pytest.mark.parametrize(
    "fields", [{"kernel_size": (3, 3)}, {"bits": 9}, {"bits": 1}, {"weight_max": 129}, {"groups": 5}, {"groups": 0}]
)
def test_a_problem_that_means_nothing_is_refused(fields):
    with pytest.raises(KernelError, match="Problem: expected stride, padding and dilation for each"):
        dataclasses.replace(LINEAR, **fields)


@pytest.mark.parametrize(
    ("machine", "size", "options", "told"),
    [
        (Isa("amx", onednn=False), 64, {}, "more slowly than on onednn: this torch has no oneDNN integer operators"),
        (Isa("other"), 64, {}, "float_exact, more slowly than on onednn: oneDNN's integer kernels need x86"),
        (Isa("amx", trust=UNTRUSTED), 64, {}, "(no primitive). Install a torch for this processor"),
        (Isa("amx", trust=FULL_ONLY), 64, {}, "failed the self-test"),
        (AMX, 70_000, {}, "a layer runs on float64 sums, slow: a sum of 70000 products may pass 32"),
        (AMX, 64, {}, ""),
        (Isa("avx2"), 64, {}, ""),  # as fast as the processor allows
        (Isa("other"), 64, {"isa": Isa("other")}, ""),  # asked for
        (Isa("other"), 64, {"backend": "reference"}, ""),
    ],
)
def test_a_slow_fallback_warns_once_and_says_what_to_do(machine, size, options, told, monkeypatch):
    monkeypatch.setattr(errors, "_WARNED", set())
    monkeypatch.setattr("modiff.kernels.dispatch.this_machine", lambda *_: machine)
    monkeypatch.setattr("modiff.kernels.kernel.this_machine", lambda *_: machine)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for inputs in (size, size, size + 1):
            plan(Problem(inputs, 8))
            Kernel(Problem(inputs, 8), torch.ones(8, inputs, dtype=torch.int8), torch.ones(8), **options)
    assert [warning.category for warning in seen] == [ModiffWarning] * bool(told)
    for warning in seen:
        assert told in str(warning.message)
        assert "leave execution='simulated'" in str(warning.message)
