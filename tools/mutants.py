"""Which small faults do the tests miss? Change one operator or constant at a time, and run the mirrored tests.

    python tools/mutants.py --count 40 --seed 1 core checkpoint

A fault is killed when its tests fail, hang or cannot be collected. Results go to a JSON file after each fault: the same
command goes on where it was stopped, and a fault in a file that changed is tried again. docs/project/mutants.md lists
what survived, and why.
"""

import argparse
import ast
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).parents[1]
ROOMS = ("core", "nn", "checkpoint")
SECONDS = 300
SWAPS: dict[type[ast.AST], ast.AST] = {
    ast.Lt: ast.LtE(), ast.LtE: ast.Lt(), ast.Gt: ast.GtE(), ast.GtE: ast.Gt(), ast.Eq: ast.NotEq(),
    ast.NotEq: ast.Eq(), ast.Is: ast.IsNot(), ast.IsNot: ast.Is(), ast.In: ast.NotIn(), ast.NotIn: ast.In(),
    ast.Add: ast.Sub(), ast.Sub: ast.Add(), ast.Mult: ast.Div(), ast.Div: ast.Mult(), ast.FloorDiv: ast.Mult(),
    ast.And: ast.Or(), ast.Or: ast.And(),
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One fault: the text between two offsets of a file becomes another one."""

    path: str
    line: int
    start: int
    stop: int
    before: str
    after: str

    @property
    def key(self) -> str:
        """What it is called in results and documents."""
        return f"{self.path}:{self.line}:{self.start} {self.before} -> {self.after}"

    def apply(self, source: str) -> str:
        """The file with the fault in it."""
        content = source.encode()
        return (content[: self.start] + self.after.encode() + content[self.stop :]).decode()


def mutants_of(path: str, source: str) -> Iterator[Mutant]:
    """All faults of a file, but in messages of errors, docstrings, annotations and f-strings.

    >>> [m.after for m in mutants_of("a.py", "def f(x): return x + 1 if not x < 2 else x")]
    ['return None', 'x < 2', 'x - 1', 'x <= 2', '2', '3']
    """
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    seen: set[tuple[int, int, str]] = set()
    for node in _counted(ast.parse(source)):
        start = starts[node.lineno - 1] + node.col_offset
        stop = starts[(node.end_lineno or node.lineno) - 1] + (node.end_col_offset or 0)
        before = source.encode()[start:stop].decode()
        for after in _faults(node):
            if "\n" not in before and (start, stop, after) not in seen:
                seen.add((start, stop, after))
                yield Mutant(path, node.lineno, start, stop, before, after)


def _counted(tree: ast.AST) -> Iterator[ast.expr | ast.Return]:
    """Expressions and returns whose value decides something."""
    stack = [tree]
    while stack:
        node = stack.pop(0)
        if isinstance(node, ast.Raise | ast.JoinedStr | ast.AnnAssign | ast.Import | ast.ImportFrom):
            stack += [node.value] if isinstance(node, ast.AnnAssign) and node.value else []
            continue
        if isinstance(node, ast.expr | ast.Return):
            yield node
        hidden = {id(getattr(node, name, None)) for name in ("annotation", "returns")}
        stack += [child for child in ast.iter_child_nodes(node) if id(child) not in hidden]


def _faults(node: ast.AST) -> Iterator[str]:
    """What may stand there instead."""
    match node:
        case ast.Return(value=value) if value is not None and not (isinstance(value, ast.Constant) and not value.value):
            yield "return None"
        case ast.Compare(left=left, ops=[op, *others], comparators=right) if type(op) in SWAPS:
            yield ast.unparse(ast.Compare(left, [SWAPS[type(op)], *others], right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in SWAPS:
            yield ast.unparse(ast.BinOp(left, SWAPS[type(op)], right))
        case ast.BoolOp(op=op, values=values):
            yield ast.unparse(ast.BoolOp(SWAPS[type(op)], values))
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield ast.unparse(operand)
        case ast.Constant(value=bool() as value):
            yield str(not value)
        case ast.Constant(value=int() | float() as value):
            yield str(value + 1)


def tests_of(path: str) -> list[str]:
    """The mirrored test file of a module; where there is none, all tests of its folder, or of the one above."""
    module = Path(path).relative_to("src/modiff")
    mirrored = ROOT / "tests" / module.parent / f"test_{module.stem}.py"
    if mirrored.is_file():
        return [str(mirrored.relative_to(ROOT))]
    folder = ROOT / "tests" / module.parent
    while not folder.is_dir():
        folder = folder.parent
    return [str(folder.relative_to(ROOT))]


def killed(mutant: Mutant, copy: Path) -> bool:
    """Whether the tests notice the fault, which is put into a copy of src and taken out again."""
    original = (ROOT / mutant.path).read_text(encoding="utf-8")
    target = copy / mutant.path
    target.write_text(mutant.apply(original), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-o",
               f"pythonpath={copy / 'src'} . tools bench", *tests_of(mutant.path)]  # fmt: skip
    paths = os.pathsep.join([str(copy / "src"), str(ROOT)])
    try:
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
                              capture_output=True, timeout=SECONDS, check=False)  # fmt: skip
        return done.returncode != 0
    except subprocess.TimeoutExpired:
        return True
    finally:
        target.write_text(original, encoding="utf-8")


def main() -> int:
    """Try what the results lack; the exit status is 0 whatever survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rooms", nargs="*", help=f"folders of src/modiff; default: {' '.join(ROOMS)}")
    parser.add_argument("--count", type=int, help="a sample of this many; all when left out")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--results", type=Path, default=Path("mutants.json"))
    options = parser.parse_args()
    paths = [path for room in options.rooms or ROOMS for path in sorted((ROOT / "src/modiff" / room).rglob("*.py"))]
    sources = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    mutants = [mutant for path, source in sources.items() for mutant in mutants_of(path, source)]
    print(f"{len(mutants)} faults in {len(sources)} files")
    if options.count is not None:
        mutants = random.Random(options.seed).sample(mutants, min(options.count, len(mutants)))
    results = json.loads(options.results.read_text()) if options.results.is_file() else {}
    digests = {path: hashlib.sha256(source.encode()).hexdigest()[:12] for path, source in sources.items()}
    todo = [m for m in mutants if results.get(m.key, {}).get("source") != digests[m.path]]
    with tempfile.TemporaryDirectory() as folder:
        copies: Queue[Path] = Queue()
        for job in range(options.jobs):
            shutil.copytree(ROOT / "src", Path(folder) / str(job) / "src", ignore=shutil.ignore_patterns("__pycache__"))
            copies.put(Path(folder) / str(job))

        def tried(mutant: Mutant) -> tuple[Mutant, bool]:
            copy = copies.get()
            try:
                return mutant, killed(mutant, copy)
            finally:
                copies.put(copy)

        with ThreadPoolExecutor(options.jobs) as pool:
            for mutant, noticed in pool.map(tried, todo):
                results[mutant.key] = {"killed": noticed, "source": digests[mutant.path]}
                options.results.write_text(json.dumps(results, indent=2) + "\n")
    survivors = [m.key for m in mutants if not results[m.key]["killed"]]
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} killed; survived:", *survivors, sep="\n  ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
