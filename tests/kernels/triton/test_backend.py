"""The GPU backend: its kernels in Triton's interpreter, or on a GPU where there is one; and when it is chosen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modiff.kernels.dispatch import Choice, plan
from modiff.kernels.encode import encode_residual
from modiff.kernels.isa import Isa
from modiff.kernels.problem import Problem
from modiff.kernels.triton import backend as gpu
from tests.kernels.problems import along

CASES = Path(__file__).with_name("gpu_cases.py")


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


def test_dispatch_takes_them_on_gpus_and_says_why_where_it_does_not(monkeypatch):
    isa, linear = Isa("avx2"), Problem(64, 64, device="cuda")
    assert plan(linear, isa) == Choice("triton", "Triton, sums in 32 bits")
    conv, why = Problem(8, 8, **along(3, 3), groups=2, device="cuda"), "grouped convolutions have no Triton kernel"
    assert plan(conv, isa) == ("reference", f"float64 sums, slow: {why}", (("triton", why),))
    assert "three axes" in plan(Problem(8, 8, **along(3, 3, 3), device="cuda"), isa).reason
    assert "32 bits" in gpu.TRITON.unsupported(Problem(200_000, 8, device="cuda"), isa)
    assert "the codes are on xpu" in gpu.TRITON.unsupported(Problem(64, 64, device="xpu"), isa)
    monkeypatch.setattr(gpu, "installed", lambda: False)
    assert plan(linear, isa).reason == "float64 sums, slow: Triton is not installed"


def test_without_the_interpreter_a_cpu_keeps_its_own_kernels(monkeypatch):
    monkeypatch.setattr(gpu, "INTERPRETED", False)
    assert gpu.TRITON.unsupported(Problem(8, 8), Isa("avx2")) == "Triton runs on GPUs, the codes are on cpu"
    monkeypatch.setattr(gpu, "encode_rows", lambda *_, **__: pytest.fail("Triton was asked"))
    encode_residual(torch.randn(2, 8), None, None, 8, granularity="token")
