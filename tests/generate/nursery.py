"""Kill a job before each of its file operations in turn, run it again, and compare with one that was left alone.

Run as a script: `python -m tests.generate.nursery FOLDER`; prints {"kills": ..., "failures": [...]}. It forks before
any thread is started, so that a process costs milliseconds, and each dies of a real SIGKILL.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from modiff.generate.run import run_job
from modiff.generate.shards import Manifest, whole_shards
from tests.generate.fakes import FakeEngine, content, fake_job

OPERATIONS = {"os.rename", "os.remove", "os.mkdir"}  # and opening a new file: all that change the disk


def in_child(folder: Path, num_images: int, log: Path, kill_before: int | None) -> int:
    """The signal that a process working on the folder died of; 0 if it came to its end, -1 if it failed."""
    pid = os.fork()
    if pid:
        status = os.waitpid(pid, 0)[1]
        return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)
    seen = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        changes = event in OPERATIONS or (event == "open" and "x" in str(arguments[1]))
        if changes and any(str(folder) in str(argument) for argument in arguments):
            if seen == kill_before:
                if event == "os.rename":  # the file is written then: leave half of it, as a kill while writing would
                    os.truncate(arguments[0], os.stat(arguments[0]).st_size // 2)  # noqa: PTH116
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    os.fsync = lambda handle: None  # a kill, unlike a power cut, loses nothing that was handed to the system
    try:
        sys.addaudithook(watch)
        run_job(fake_job(num_images), folder, engine=FakeEngine(log=log))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def one(place: Path, before: Path | None, num_images: int, kill_before: int, expected: dict[str, bytes]) -> str | None:
    """What is wrong after a kill and a second run; None if nothing is; "end" if the job was over before the kill.

    before: a folder to begin from.
    """
    folder, second = place / "images", place / "second"
    place.mkdir()
    if before is not None:
        shutil.copytree(before, folder)
    died_of = in_child(folder, num_images, place / "log", kill_before)
    if died_of != signal.SIGKILL:
        return "end" if died_of == 0 else f"first run: {died_of}"
    left = whole_shards(folder, Manifest.load(folder))[0] if (folder / "manifest.json").is_file() else ()
    if in_child(folder, num_images, second, None) != 0:
        return "second run failed"
    if content(folder) != expected:
        return f"other bytes in {sorted(content(folder))}"
    drawn = second.read_text().splitlines() if second.is_file() else []
    again = {f"{shard.first} {shard.count}" for shard in left} & set(drawn)
    return f"drawn again: {sorted(again)}" if again else None


def main(place: Path) -> None:
    kills, failures = 0, []
    short, whole, num_images = place / "short", place / "whole", 7
    in_child(short, 3, place / "log", None)
    in_child(whole, num_images, place / "log", None)
    for name, before in (("new", None), ("extended", short)):
        for kill_before in range(1000):
            wrong = one(place / f"{name}-{kill_before}", before, num_images, kill_before, content(whole))
            if wrong == "end":
                break
            kills += 1
            failures += [f"{name} before operation {kill_before}: {wrong}"] if wrong else []
    print(json.dumps({"kills": kills, "failures": failures}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
