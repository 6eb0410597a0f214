"""Instruction levels from capabilities and oneDNN's limit, and what this process finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from modiff.kernels.isa import LIMIT, Isa, detect, level_of

EVERYTHING = {
    "sse4_1": True, "avx2": True, "avx_vnni": True, "avx512_f": True, "avx512_bw": True, "avx512_vnni": True,
    "amx_int8": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("limit", "level"),
    [
        ("", "amx"),
        ("DEFAULT", "amx"),
        ("AVX512_CORE_AMX", "amx"),
        ("AVX10_1_512_AMX_FP16", "amx"),
        ("AVX512_CORE_VNNI", "avx512_vnni"),
        ("avx512_core_bf16", "avx512_vnni"),
        (" AVX512_CORE_FP16 ", "avx512_vnni"),
        ("AVX10_1_512", "avx512_vnni"),
        ("AVX512_CORE", "avx512"),
        ("AVX2_VNNI_2", "avx2_vnni"),
        ("AVX2_VNNI", "avx2_vnni"),
        ("AVX2", "avx2"),
        ("AVX", "sse41"),
        ("SSE41", "sse41"),
    ],
)
def test_the_limit_of_onednn_caps_the_level(limit, level):
    assert level_of(EVERYTHING, limit) == level


@pytest.mark.parametrize(
    ("missing", "level"),
    [
        ((), "amx"),
        (("amx_int8",), "avx512_vnni"),
        (("amx_int8", "avx512_vnni"), "avx2_vnni"),
        (("amx_int8", "avx512_vnni", "avx_vnni"), "avx512"),
        (("amx_int8", "avx512_vnni", "avx_vnni", "avx512_bw"), "avx2"),
        (("amx_int8", "avx512_vnni", "avx_vnni", "avx512_f", "avx2"), "sse41"),
        (tuple(EVERYTHING), "other"),
    ],
)
def test_the_level_is_the_best_that_the_processor_has(missing, level):
    assert level_of({name: name not in missing for name in EVERYTHING}) == level


def test_a_limit_above_the_processor_gives_nothing():
    assert level_of({"avx2": True, "sse4_1": True}, "AVX512_CORE_VNNI") == "avx2"


def test_only_vnni_and_amx_sum_in_32_bits():
    assert [level for level in ("amx", "avx512_vnni", "avx2_vnni", "avx512", "avx2", "sse41", "other")
            if Isa(level).sums_in_int32] == ["amx", "avx512_vnni", "avx2_vnni"]  # fmt: skip


def test_this_process_has_a_level_and_the_limit_is_read_from_the_environment(monkeypatch):
    monkeypatch.delenv(LIMIT, raising=False)
    free = detect()
    if free.level == "other":
        pytest.skip("not an x86 processor")
    monkeypatch.setenv(LIMIT, "SSE41")
    assert detect() == Isa("sse41", free.onednn)


LEVELS = """
import json, torch
torch.set_num_threads(1)
from modiff.kernels.isa import detect
from modiff.kernels.kernel import Kernel
from modiff.kernels.problem import Problem
from modiff.kernels.onednn import self_test
from tests.kernels.problems import operands, sums_of
found = {"level": detect().level, "bounded": self_test().bounded, "full": self_test().full, "rows": []}
for bits, largest in ((8, 127), (8, 64), (7, 128), (4, 127), (8, 8)):
    for problem in (
        Problem(131, 24, bits=bits, weight_max=largest),
        Problem(20, 24, (3, 3), (1, 1), (1, 1), (1, 1), bits=bits, weight_max=largest),
        Problem(32, 32, (3, 3), (2, 2), (1, 1), (1, 1), groups=2, bits=bits, weight_max=largest),
        Problem(16, 16, (3, 3), (1, 1), (1, 1), (1, 1), groups=16, bits=bits, weight_max=largest),
    ):
        codes, weight = operands(problem, 1, extreme=True)
        chosen = Kernel(problem, weight, torch.ones(problem.outputs)).choice.backend
        made, exact = (sums_of(problem, codes, weight, name) for name in (chosen, "reference"))
        right = torch.equal(made.double(), exact)
        found["rows"].append([bits, largest, chosen, right])
print(json.dumps(found))
"""


@pytest.mark.parametrize("limit", ["AVX512_CORE_VNNI", "AVX2", "SSE41"])
def test_the_chosen_backend_adds_up_right_in_a_process_with_that_limit(limit):
    environment = {**os.environ, LIMIT: limit, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", LEVELS], capture_output=True, text=True, check=True, timeout=150, env=environment
    )
    found = json.loads(done.stdout)
    assert all(right for *_, right in found["rows"])
    if limit == "SSE41" and detect().level != "other":
        assert found["level"] == "sse41"
    if found["level"] in ("avx2", "sse41"):
        assert (found["bounded"], found["full"]) == (True, False)
        assert {chosen for bits, largest, chosen, _ in found["rows"] if (bits, largest) == (8, 127)} == {"float_exact"}
        assert {chosen for bits, largest, chosen, _ in found["rows"] if (bits, largest) != (8, 127)} == {"onednn"}
