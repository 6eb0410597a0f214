"""The house rules that a syntax tree can check: sizes, no debts, no asserts on users' input, no blind pass-through."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "experiments", "training", "tools", "bench")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

FUNCTION_LINES = 60
FILE_LINES = 400
LINES_OF = {"src/modiff/core/recursion.py": 200}

DEBT = re.compile(r"\b(TO" + r"DO|FIX" + r"ME)\b")  # in two halves, so that this line is none
Function = ast.FunctionDef | ast.AsyncFunctionDef


def long_file(source: str, limit: int) -> Iterator[str]:
    """The file, when it has more than `limit` lines."""
    lines = len(source.splitlines())
    if lines > limit:
        yield f"{lines} lines, {limit} is the most"


def long_functions(source: str) -> Iterator[str]:
    """Functions over FUNCTION_LINES, decorators and docstring counted."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, Function):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            lines = (node.end_lineno or first) - first + 1
            if lines > FUNCTION_LINES:
                yield f"line {first}: {node.name} has {lines} lines, {FUNCTION_LINES} is the most"


def debts(source: str) -> Iterator[str]:
    """Lines that put something off."""
    for number, line in enumerate(source.splitlines(), 1):
        if DEBT.search(line):
            yield f"line {number}: {line.strip()}"


def asserts(source: str) -> Iterator[str]:
    """`assert` statements: python -O drops them, and their error has no message for the user."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assert):
            yield f"line {node.lineno}: assert; raise an error of modiff.errors"


def blind_pass_through(source: str) -> Iterator[str]:
    """Functions that hand their own **kwargs on; only a wrapper made with functools.wraps has to."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, Function) or node.args.kwarg is None or any(map(_is_wraps, node.decorator_list)):
            continue
        for call in ast.walk(node):
            if isinstance(call, ast.Call) and any(_is_double_star(word, node.args.kwarg.arg) for word in call.keywords):
                yield f"line {call.lineno}: {node.name} passes **{node.args.kwarg.arg} on; name the arguments"


def _is_wraps(decorator: ast.expr) -> bool:
    return isinstance(decorator, ast.Call) and ast.unparse(decorator.func) in ("wraps", "functools.wraps")


def _is_double_star(word: ast.keyword, name: str) -> bool:
    return word.arg is None and isinstance(word.value, ast.Name) and word.value.id == name


def findings(source: str, name: str) -> list[str]:
    """Everything in `source` that breaks a rule."""
    rules = (long_functions, debts, asserts, blind_pass_through)
    return [*long_file(source, LINES_OF.get(name, FILE_LINES)), *(line for rule in rules for line in rule(source))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_keeps_the_house_rules(path: Path) -> None:
    assert findings(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()) == []


TESTS = sorted((ROOT / "tests").rglob("*.py"))


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_of_tests_is_short_enough(path: Path) -> None:
    assert list(long_file(path.read_text(encoding="utf-8"), FILE_LINES)) == []


def test_the_files_with_a_limit_of_their_own_exist() -> None:
    assert set(LINES_OF) <= {path.relative_to(ROOT).as_posix() for path in FILES}


BODY = "    x = 1\n"


@pytest.mark.parametrize(
    ("source", "name", "found"),
    [
        ("def f():\n" + BODY * 59, "src/a.py", ""),
        ("def f():\n" + BODY * 60, "src/a.py", "f has 61 lines"),
        ("@g\ndef f():\n" + BODY * 59, "src/a.py", "f has 61 lines"),
        ("class C:\n    async def f(self):\n" + ("    " + BODY) * 60, "src/a.py", "f has 61 lines"),
        ("x = 1\n" * 400, "src/a.py", ""),
        ("x = 1\n" * 401, "src/a.py", "401 lines"),
        ("x = 1\n" * 200, "src/modiff/core/recursion.py", ""),
        ("x = 1\n" * 201, "src/modiff/core/recursion.py", "201 lines"),
        ("x = 1  # TO" + "DO later\n", "src/a.py", "later"),
        ("x = 1  # FIX" + "ME: later\n", "src/a.py", "later"),
        ("x = 'mastodons'\n", "src/a.py", ""),
        ("def f(x):\n    assert x > 0\n", "src/a.py", "assert"),
        ("def f(**options):\n    return g(1, **options)\n", "src/a.py", "f passes **options on"),
        ("def f(**options):\n    return g(1, **dict(a=1))\n", "src/a.py", ""),
        ("def f(values):\n    return g(**values)\n", "src/a.py", ""),
        ("@functools.wraps(g)\ndef f(*a, **options):\n    return g(*a, **options)\n", "src/a.py", ""),
    ],
)
def test_each_rule_finds_what_breaks_it_and_nothing_else(source: str, name: str, found: str) -> None:
    result = findings(source, name)
    assert len(result) == bool(found)
    assert all(found in line for line in result)
