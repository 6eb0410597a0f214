"""The dry run of bench/gpu_matmul.py: every variant that a CPU has runs, and nothing is called a time."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "bench/gpu_matmul.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_dry_run_names_every_variant_and_no_time() -> None:
    done = run("--dry-run")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 8
    for shape, variants in (("tiny matmul", 5), ("tiny conv", 3)):
        assert sum(line.startswith(shape) for line in lines) == variants
    assert all("nan us" in line or "cannot run" in line for line in lines)
    assert all("nan us" in line for line in lines if "ours" in line)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    done = run()
    assert done.returncode == 1
    assert done.stderr.strip() == ("gpu_matmul: expected a CUDA device, got none. Use --dry-run to see that it runs.")


def test_times_of_an_interpreter_are_not_kept() -> None:
    assert "expected a run on a GPU, got --dry-run" in run("--dry-run", "--json", "x.json").stderr
