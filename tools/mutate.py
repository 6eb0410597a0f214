"""Plant one deliberate bug at a time in a copy of the tree and see whether the tests notice.

    python tools/mutate.py             all of tools/mutations.py
    python tools/mutate.py --list      what there is, with its numbers
    python tools/mutate.py --only 3    one of them; may be given several times

Exit code 0: every bug was killed. 1: at least one survived. 2: the table, or the tests without a bug, are at fault.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mutations import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("src", "tests", "tools", "training", "bench", "pyproject.toml")
CAUGHT, FOUND_NOTHING = 1, 0  # pytest's exit codes: a test failed; all passed
TIMEOUT = 600.0  # seconds; a bug that makes the tests hang is noticed too


class MutationError(Exception):
    """The run says nothing about the tests: a bug that cannot be planted, or tests that fail without any."""


def mutated(source: str, mutation: Mutation) -> str:
    """`source` with the bug. Raises: MutationError unless `old` occurs exactly once and `new` differs."""
    count = source.count(mutation.old)
    if count != 1:
        raise MutationError(
            f"{mutation.file}: expected {mutation.old!r} once, got it {count} times. "
            "The code moved on, or the text is too short. Update tools/mutations.py."
        )
    if mutation.new == mutation.old:
        raise MutationError(f"{mutation.file}: expected a change, got {mutation.old!r} as both. Update the table.")
    return source.replace(mutation.old, mutation.new)


def copy_tree(root: Path, copy: Path) -> None:
    """What the tests need, without compiled files: those could hide a change of the same size in the same second."""
    for name in COPIED:
        source = root / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        elif source.exists():
            shutil.copy2(source, copy / name)


def run_tests(copy: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Exit code and output of pytest on the copy; its `src` comes before any installed modiff."""
    environment = {**os.environ, "PYTHONPATH": str(copy / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return CAUGHT, f"no end within {TIMEOUT:.0f} s"
    return done.returncode, done.stdout + done.stderr


def is_killed(copy: Path, mutation: Mutation) -> bool:
    """Plant the bug, run its tests, take it out again.

    Raises: MutationError if the tests could not run at all: code that does not import proves nothing about them.
    """
    file = copy / mutation.file
    original = file.read_text(encoding="utf-8")
    file.write_text(mutated(original, mutation), encoding="utf-8")
    try:
        code, output = run_tests(copy, mutation.tests)
    finally:
        file.write_text(original, encoding="utf-8")
    if code not in (CAUGHT, FOUND_NOTHING):
        raise MutationError(
            f"{mutation.file}: expected tests that run, got pytest's exit code {code}. "
            f"The bug breaks the import, or one of {mutation.tests} does not exist. Plant a bug that runs.\n{output}"
        )
    return code == CAUGHT


def survivors(root: Path, chosen: Sequence[tuple[int, Mutation]]) -> list[int]:
    """Numbers of the bugs that no test noticed; prints a line for each bug.

    Raises: MutationError if there is no bug, if one cannot be planted, or if the tests fail without one.
    """
    if not chosen:
        raise MutationError("tools/mutations.py: expected bugs, got none. A run without bugs proves nothing. Add some.")
    for _, mutation in chosen:
        mutated((root / mutation.file).read_text(encoding="utf-8"), mutation)  # a stale table shows before a long run
    alive: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        copy_tree(root, copy)
        tests = sorted({test for _, mutation in chosen for test in mutation.tests})
        code, output = run_tests(copy, tests)
        if code != FOUND_NOTHING:
            raise MutationError(f"tests: expected a pass without a bug, got exit code {code}. Repair them.\n{output}")
        for number, mutation in chosen:
            killed = is_killed(copy, mutation)
            print(f"{'killed  ' if killed else 'SURVIVED'} {title(number, mutation)}", flush=True)
            if not killed:
                alive.append(number)
    return alive


def title(number: int, mutation: Mutation) -> str:
    """One line that names a bug."""
    return f"{number:3d} {mutation.file}: {mutation.why}"


def main(arguments: Sequence[str], root: Path = ROOT, table: Sequence[Mutation] = MUTATIONS) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, action="append", metavar="N", help="number of a bug, from --list")
    parser.add_argument("--list", action="store_true", help="print the bugs and stop")
    options = parser.parse_args(arguments)
    numbers = options.only or range(len(table))
    unknown = [number for number in numbers if not 0 <= number < len(table)]
    if unknown:
        parser.error(f"--only: expected a number below {len(table)}, got {unknown[0]}. See --list.")
    chosen = [(number, table[number]) for number in numbers]
    if options.list:
        print("\n".join(title(number, mutation) for number, mutation in chosen))
        return 0
    try:
        alive = survivors(root, chosen)
    except MutationError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{len(chosen) - len(alive)} of {len(chosen)} killed")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
