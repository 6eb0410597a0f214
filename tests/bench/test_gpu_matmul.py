"""The dry run of bench/gpu_matmul.py: every variant that a CPU has runs, and nothing is called a time."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu_matmul.py"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_dry_run_names_every_variant_and_no_time():
    command = [sys.executable, str(SCRIPT), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0:2] for line in lines] == [["tiny", "matmul"]] * 5 + [["tiny", "conv"]] * 3
    assert all("nan us" in line or ("cannot run" in line and "ours" not in line) for line in lines)
