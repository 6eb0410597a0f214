"""The public face: what `modiff` exports is what `__all__` says, all of it is documented, and no name stands twice."""

from __future__ import annotations

import ast
import inspect
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import pytest

import modiff

PACKAGE = Path(modiff.__file__).parent


def test_all_is_sorted_and_exactly_what_a_user_sees() -> None:
    listed = list(modiff.__all__)
    assert listed == sorted(set(listed))
    values = {name: getattr(modiff, name) for name in dir(modiff) if not name.startswith("_")}
    seen = {name for name, value in values.items() if name in listed or not isinstance(value, ModuleType)}
    assert {name for name in listed if not name.startswith("__")} == seen - {"annotations"}


@pytest.mark.parametrize("name", modiff.__all__)
def test_a_public_name_has_a_docstring_of_its_own(name: str) -> None:
    value = getattr(modiff, name)
    if isinstance(value, type):  # neither inherited nor the signature that a dataclass generates
        text = vars(value).get("__doc__") or ""
        assert text
        assert not text.startswith(f"{name}(")
    else:
        assert isinstance(value, str) or inspect.getdoc(value)


def names_twice(files: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Public top-level functions and classes that several of the (path, source) define.

    A command carries the name of its verb.
    """
    places: defaultdict[str, list[str]] = defaultdict(list)
    for path, source in files:
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                if not path.startswith("cli/"):
                    places[node.name].append(path)
    return {name: paths for name, paths in places.items() if len(paths) > 1}


def test_no_public_name_stands_in_two_modules():
    files = [(p.relative_to(PACKAGE).as_posix(), p.read_text(encoding="utf-8")) for p in sorted(PACKAGE.rglob("*.py"))]
    assert names_twice(files) == {}
    files = [("a.py", "def f(): ..."), ("b.py", "class f: ..."), ("cli/f.py", "def g(): ..."), ("c.py", "def g(): ...")]
    assert names_twice(files) == {"f": ["a.py", "b.py"]}
