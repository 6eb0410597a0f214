"""Kill a job before each of its file operations in turn, run it again, and compare with one that was left alone.

Run as a script, `python -m tests.kills MODULE:FUNCTION FOLDER`: calls FUNCTION(folder), which does the job, and prints
{"kills": ..., "failures": [...]}. It forks before any thread is started, and every child dies of a real SIGKILL.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def run_in_child(work: Callable[[], object], folder: Path, kill_before: int | None) -> int:
    """The signal that `work` died of in a process of its own; 0 if it came to its end, -1 if it failed."""
    pid = os.fork()
    if pid:
        status = os.waitpid(pid, 0)[1]
        return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)
    seen = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        changes = event in {"os.rename", "os.remove", "os.mkdir", "os.truncate"}
        if (changes or (event == "open" and "x" in str(arguments[1]))) and str(folder) in str(arguments[0]):
            if seen == kill_before:
                if event == "os.rename" and Path(arguments[0]).is_file():  # leave half of it, as a kill while writing
                    os.truncate(arguments[0], Path(arguments[0]).stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    os.fsync = lambda handle: None  # a kill, unlike a power cut, loses nothing that was handed to the system
    try:
        sys.addaudithook(watch)
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def content(folder: Path) -> dict[str, bytes]:
    """The files of a folder and of those in it, without locks."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def main(target: str, place: Path) -> None:
    module, name = target.split(":")
    job = getattr(importlib.import_module(module), name)
    failures: list[str] = []
    run_in_child(lambda: job(place / "whole"), place, None)
    expected = content(place / "whole")
    for kill_before in range(1000):
        folder = place / str(kill_before)
        died_of = run_in_child(lambda folder=folder: job(folder), folder, kill_before)
        if died_of != signal.SIGKILL:
            failures += [f"ended with {died_of}"] if died_of else []
            break
        if run_in_child(lambda folder=folder: job(folder), folder, None) or content(folder) != expected:
            failures.append(f"killed before operation {kill_before}, run again: {sorted(content(folder))}")
    print(json.dumps({"kills": kill_before, "failures": failures}))


def check_kills(target: str, folder: Path, *, at_least: int) -> None:
    """Assert that the job `MODULE:FUNCTION` survives a kill before each of its file operations."""
    command = [sys.executable, "-m", "tests.kills", target, str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["failures"] == []
    assert result["kills"] >= at_least


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
