"""The GPU backend: its kernels in Triton's interpreter, or on a GPU where there is one; and when it is chosen."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modiff.kernels.dispatch import choose_backend
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


def test_dispatch_takes_them_on_gpus_and_says_why_where_it_does_not(monkeypatch):
    isa, linear = Isa("avx2"), Problem(64, 64, device="cuda")
    assert choose_backend(linear, isa) == ("triton", "Triton, sums in 32 bits")
    conv = Problem(8, 8, (3, 3), (1, 1), (1, 1), (1, 1), groups=2, device="cuda")
    assert choose_backend(conv, isa) == (
        "reference", "float64 sums, slow: grouped convolutions have no Triton kernel",
    )  # fmt: skip
    three = Problem(8, 8, (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), device="cuda")
    assert "three axes" in choose_backend(three, isa).reason
    assert "32 bits" in gpu.gpu_obstacle(Problem(200_000, 8, device="cuda"))
    assert "the codes are on xpu" in gpu.gpu_obstacle(dataclasses.replace(linear, device="xpu"))
    monkeypatch.setattr(gpu, "installed", lambda: False)
    assert choose_backend(linear, isa).reason == "float64 sums, slow: Triton is not installed"


def test_without_the_interpreter_a_cpu_keeps_its_own_kernels(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert os.environ.get("TRITON_INTERPRET") is None
    assert gpu.gpu_obstacle(Problem(8, 8)) == "Triton runs on GPUs, the codes are on cpu"
    codes, scale = torch.zeros(2, 8, dtype=torch.uint8), torch.ones(2, 1)
    assert not gpu.code(torch.randn(2, 8), None, codes, scale, 8, 1.0, "token", -1, dynamic=True)
    assert int(codes.sum()) == 0
