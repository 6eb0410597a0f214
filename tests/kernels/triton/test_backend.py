"""The GPU backend: its kernels in Triton's interpreter, or on a GPU where there is one; and when it is chosen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modiff.kernels.dispatch import plan
from modiff.kernels.encode import encode_residual
from modiff.kernels.isa import Isa
from modiff.kernels.problem import Problem
from modiff.kernels.triton import backend as gpu

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


def test_a_cpu_keeps_its_own_kernels_and_a_gpu_without_triton_takes_the_reference(monkeypatch):
    monkeypatch.setattr(gpu, "INTERPRETED", False)
    monkeypatch.setattr("modiff.kernels.encode._on_gpu", lambda *_, **__: pytest.fail("Triton was asked"))
    encode_residual(torch.randn(2, 8), None, None, 8, granularity="token")
    monkeypatch.setattr(gpu, "installed", lambda: False)
    assert plan(Problem(64, 64, device="cuda"), Isa("avx2")).reason == "float64 sums, slow: Triton is not installed"
