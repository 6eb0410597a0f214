"""Instruction levels from capabilities and oneDNN's limit; processes that pretend less add up right."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from modiff.kernels import native
from modiff.kernels.isa import LIMIT, Isa, detect, level_of

LEVELS = {"sse4_1": "sse41", "avx2": "avx2", "avx512_f": "avx2", "avx512_bw": "avx512", "avx_vnni": "avx512",
          "avx512_vnni": "avx512_vnni", "amx_int8": "amx"}  # fmt: skip
"""The capabilities of a processor in the order in which they came, and the level reached with all up to one."""


@pytest.mark.parametrize(
    ("level", "limits"),
    [("amx", ("", "DEFAULT", "AVX512_CORE_AMX", "AVX10_1_512_AMX_FP16")), ("avx512", ("AVX512_CORE",)),
     ("avx512_vnni", ("AVX512_CORE_VNNI", "avx512_core_bf16", "AVX10_1_512", " AVX512_CORE_FP16 ")),
     ("avx2_vnni", ("AVX2_VNNI_2", "AVX2_VNNI")), ("avx2", ("AVX2",)), ("sse41", ("AVX", "SSE41"))],
)  # fmt: skip
def test_the_limit_of_onednn_caps_the_level_and_gives_nothing(level, limits):
    assert {level_of(dict.fromkeys(LEVELS, True), limit) for limit in limits} == {level}
    assert {level_of({"sse4_1": True}, limit) for limit in limits} == {"sse41"}


@pytest.mark.parametrize("last", ["", *LEVELS])
def test_the_level_is_the_best_that_the_processor_has_and_only_vnni_and_amx_sum_in_32_bits(last):
    names = list(LEVELS)[: list(LEVELS).index(last) + 1 if last else 0]
    level = level_of({name: name in names for name in LEVELS})
    assert level == LEVELS.get(last, "other")
    assert Isa(level).sums_in_int32 == ("vnni" in level or level == "amx")


CHILD = """
import json, torch
torch.set_num_threads(1)
from modiff.kernels.isa import detect
from modiff.kernels.kernel import Kernel
from modiff.kernels.onednn import self_test
from modiff.kernels.problem import Problem
from tests.kernels.problems import along, operands, sums_of
found = {"level": detect().level, "trust": self_test()[:2], "rows": [[], []]}
for bits, largest in ((8, 127), (8, 64), (7, 128), (4, 127), (8, 8)):
    for problem in (
        Problem(131, 24, bits=bits, weight_max=largest),
        Problem(20, 24, **along(3, 3), bits=bits, weight_max=largest),
        Problem(32, 32, (3, 3), (2, 2), (1, 1), (1, 1), groups=2, bits=bits, weight_max=largest),
        Problem(16, 16, **along(3, 3), groups=16, bits=bits, weight_max=largest),
    ):
        codes, weight = operands(problem, 1, extreme=True)
        chosen = Kernel(problem, weight, torch.ones(problem.outputs)).choice.backend
        made, exact = (sums_of(problem, codes, weight, name) for name in (chosen, "reference"))
        found["rows"][(bits, largest) != (8, 127)].append([bits, largest, chosen, torch.equal(made.double(), exact)])
print(json.dumps(found))
"""


@pytest.mark.parametrize("limit", ["AVX512_CORE_VNNI", "AVX2", "SSE41"])
def test_the_chosen_backend_adds_up_right_in_a_process_with_that_limit(limit):
    """Instructions that a processor has can be hidden from oneDNN: one machine tests what others run."""
    level = level_of(torch.cpu.get_capabilities(), limit)
    if level == detect().level:
        pytest.skip("this process has that level: test_kernel.py tests it")
    environment = {**os.environ, LIMIT: limit, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    found = json.loads(subprocess.check_output([sys.executable, "-c", CHILD], text=True, timeout=150, env=environment))
    vnni, chosen = Isa(level).sums_in_int32, ({name for *_, name, _ in rows} for rows in found["rows"])
    loops = {"native"} if level in ("avx2", "avx512") and native.find_compiler() else set()
    assert (found["level"], found["trust"]) == (level, [True, vnni])
    assert list(chosen) == [loops | {"onednn" if vnni else "float_exact"}, loops | {"onednn"}]
    assert all(right for rows in found["rows"] for *_, right in rows)
