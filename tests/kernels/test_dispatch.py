"""The choice of a backend is a pure function of problem, instructions and trust; the self-test believes nothing."""

import dataclasses
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from modiff import KernelError, ModiffWarning, errors
from modiff.kernels import dispatch, native
from modiff.kernels.dispatch import plan
from modiff.kernels.encode import encode_residual
from modiff.kernels.exact import REFERENCE
from modiff.kernels.isa import LIMIT, Isa, Trust, detect, level_of
from modiff.kernels.kernel import Kernel
from modiff.kernels.onednn import ONEDNN, self_test
from modiff.kernels.problem import Problem
from modiff.kernels.product import NATIVE
from modiff.kernels.triton import backend as gpu
from tests.kernels.problems import along

LINEAR, CONV = Problem(1152, 1152), Problem(320, 320, **along(3, 3))
FEW = dataclasses.replace(LINEAR, bits=4)
AMX, FULL_ONLY, UNTRUSTED = Isa("amx"), Trust(bounded=True, full=False), Trust(False, False, detail="no primitive")


def grouped(groups: int, inputs: int, outputs: int) -> Problem:
    return dataclasses.replace(CONV, groups=groups, inputs=inputs, outputs=outputs)


@pytest.mark.parametrize(
    ("problem", "isa", "backend", "reason"),
    [
        *((problem, AMX, "onednn", "oneDNN int8 on amx, sums in 32 bits") for problem in (LINEAR, CONV, FEW)),
        *((problem, Isa(level), "native", f"sums in {bits} bits")
          for level, bits in (("avx512_vnni", 32), ("avx2_vnni", 32), ("avx512", 16), ("avx2", 16))
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
        *((dataclasses.replace(problem, bits=bits, weight_max=largest), Isa("sse41"), backend, "16 bits")
          for problem in (LINEAR, CONV) for bits, largest, backend in (
              (8, 64, "onednn"), (8, 65, "float_exact"), (7, 128, "onednn"))),  # without VNNI, pairs may saturate
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
    loops = {"native"} if level in ("avx2", "avx512", "avx512_vnni") and native.find_compiler() else set()
    assert (found["level"], found["trust"]) == (level, [True, vnni])
    assert list(chosen) == [loops | {"onednn" if vnni else "float_exact"}, loops | {"onednn"}]
    assert all(right for rows in found["rows"] for *_, right in rows)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """The self-test as a new process has it; what it shows here is forgotten."""
    self_test.cache_clear()
    yield
    self_test.cache_clear()


def right(operator, codes):
    return REFERENCE.sums(operator, codes).float()


def wrong(operator, codes):
    return right(operator, codes) + 1


def pairs_in_16_bits(operator, codes):
    """What processors without VNNI do: products are added in pairs, and each pair saturates."""
    if operator.axes:
        return right(operator, codes)
    products = codes.long().unsqueeze(-2) * operator.weight_codes().long()
    products = torch.nn.functional.pad(products, (0, products.shape[-1] % 2))
    pairs = (products[..., ::2] + products[..., 1::2]).clamp(-(2**15), 2**15 - 1)
    return (pairs.sum(-1) - operator.zero_point * operator.weight_codes().long().sum(1)).float()


def refusing(error):
    def sums(*_):
        raise error

    return sums


@pytest.mark.parametrize(
    ("sums", "trust"),
    [
        (right, Trust(bounded=True, full=True)),
        (pairs_in_16_bits, Trust(bounded=True, full=False)),
        (wrong, Trust(bounded=False, full=False)),
        (refusing(RuntimeError("no primitive\nmore")), Trust(bounded=False, full=False, detail="no primitive")),
        (refusing(TypeError("18 arguments")), Trust(bounded=False, full=False, detail="18 arguments")),
    ],
)
def test_it_shows_what_the_operators_do_once_per_process(sums, trust, monkeypatch):
    monkeypatch.setattr(ONEDNN, "sums", sums)
    assert self_test() == trust
    monkeypatch.setattr(ONEDNN, "sums", refusing(AssertionError("asked again")))
    assert self_test() == trust


@pytest.mark.parametrize(
    ("onednn", "sizes", "backend", "why"),
    [(False, (3, 3), "reference", "no oneDNN"), (False, (), "float_exact", "no oneDNN"),
     (True, (), "float_exact", "failed the self-test")],
)  # fmt: skip
def test_a_kernel_on_this_machine_heeds_the_self_test_and_without_onednn_asks_none(
    onednn, sizes, backend, why, monkeypatch
):
    if onednn and (not detect().onednn or detect().level == "other"):
        pytest.skip("no oneDNN for this processor")
    monkeypatch.setattr(NATIVE, "unsupported", lambda *_: "switched off")
    monkeypatch.setattr(ONEDNN, "sums", wrong if onednn else refusing(AssertionError("oneDNN was asked")))
    monkeypatch.setattr(dispatch, "detect", lambda: Isa(detect().level, onednn=onednn))
    made = Kernel(Problem(4, 3, **along(*sizes), bits=4), torch.ones(3, 4, *sizes, dtype=torch.int8), torch.ones(3))
    assert made.choice.backend == backend
    assert why in made.choice.reason


CASES = Path(__file__).parent / "triton" / "gpu_cases.py"


@pytest.mark.skipif(not gpu.installed(), reason="Triton is not installed")
def test_the_kernels_equal_the_reference_bit_for_bit() -> None:
    """In a process of its own: Triton decides at its import whether it interprets."""
    environment = dict(os.environ) | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(CASES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=500,
                          cwd=CASES.parents[3])  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def test_a_cpu_keeps_its_own_kernels_and_a_gpu_without_triton_takes_the_reference(monkeypatch):
    monkeypatch.setattr(gpu, "INTERPRETED", False)
    monkeypatch.setattr("modiff.kernels.encode._on_gpu", lambda *_, **__: pytest.fail("Triton was asked"))
    encode_residual(torch.randn(2, 8), None, None, 8, granularity="token")
    monkeypatch.setattr(gpu, "installed", lambda: False)
    assert plan(Problem(64, 64, device="cuda"), Isa("avx2")).reason == "float64 sums, slow: Triton is not installed"
