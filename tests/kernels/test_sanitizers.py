"""The C++ loops read and write their own memory alone, and overflow nowhere: ASan and UBSan over their tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from modiff.kernels.native import CACHE, find_compiler

KERNELS = Path(__file__).parent
TESTS = [str(KERNELS / f"test_{name}.py") for name in ("product", "encode", "input_fusion", "kernel", "native")]
LOOPS = (
    "(product or encode or fusion or compiled_loop_equals or every_bit or cancel) and not every_encoder and not core_s"
)


def sanitized(arguments: list[str], cache: Path) -> subprocess.CompletedProcess[str]:
    """`tests.kernels.sanitized` in another process, with gcc's sanitizers loaded first; libraries go to `cache`."""
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    names = [f"lib{name}.so" for name in ("asan", "stdc++")]
    command = [[compiler, f"-print-file-name={name}"] for name in names]
    paths = [subprocess.run(each, capture_output=True, text=True, check=False).stdout.strip() for each in command]
    if not all(Path(path).is_absolute() for path in paths):
        pytest.skip("the compiler brings no libasan.so: not gcc")
    options = {"LD_PRELOAD": " ".join(paths), "ASAN_OPTIONS": "detect_leaks=0", CACHE: str(cache)}
    return subprocess.run(
        [sys.executable, "-m", "tests.kernels.sanitized", *arguments],
        capture_output=True, text=True, check=False, timeout=600, env={**os.environ, **options},
        cwd=KERNELS.parents[1],
    )  # fmt: skip


def test_the_sanitizers_see_a_loop_that_reads_behind_a_tensor(tmp_path):
    done = sanitized(["overflow"], tmp_path)
    assert done.returncode not in (0, 3)
    assert "heap-buffer-overflow" in done.stderr


def test_tests_of_the_loops_pass_under_the_sanitizers(tmp_path):
    done = sanitized(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", LOOPS, *TESTS], tmp_path)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
