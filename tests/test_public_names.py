"""The public face: what `modiff` exports is what `__all__` says, and all of it is documented."""

from __future__ import annotations

import ast
import inspect
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import modiff


def public_names(namespace: object) -> set[str]:
    """Names without an underscore that a user sees. A submodule counts only when `__all__` lists it."""
    listed = getattr(namespace, "__all__", [])
    return {
        name
        for name in dir(namespace)
        if not name.startswith("_") and (name in listed or not _is_machinery(getattr(namespace, name)))
    }


def _is_machinery(value: object) -> bool:
    """A submodule, or what `from __future__ import annotations` leaves behind."""
    return isinstance(value, ModuleType) or type(value).__module__ == "__future__"


def own_docstring(name: str, value: object) -> str:
    """The docstring written for `value`: not inherited, not the signature that a dataclass generates."""
    if not isinstance(value, type):
        return inspect.getdoc(value) or ""
    text = vars(value).get("__doc__") or ""
    return "" if text.startswith(f"{name}(") else text


def test_all_is_sorted_and_has_no_name_twice() -> None:
    assert list(modiff.__all__) == sorted(set(modiff.__all__))


def test_all_is_exactly_what_a_user_sees() -> None:
    assert {name for name in modiff.__all__ if not name.startswith("__")} == public_names(modiff)


@pytest.mark.parametrize("name", modiff.__all__)
def test_a_public_name_exists_and_has_a_docstring(name: str) -> None:
    value = getattr(modiff, name)
    assert isinstance(value, str) or own_docstring(name, value).strip()


def test_a_name_that_leaks_is_seen_and_a_submodule_is_not() -> None:
    names = SimpleNamespace(
        __all__=["listed"], leaked=1, listed=inspect, submodule=inspect, annotations=annotations, _private=1
    )
    assert public_names(names) == {"leaked", "listed"}


def test_inherited_and_generated_docstrings_do_not_count() -> None:
    documented = type("Documented", (), {"__doc__": "One sentence."})
    child = type("Child", (documented,), {})
    generated = type("Generated", (), {"__doc__": "Generated(bits: int = 8)"})
    assert own_docstring("Documented", documented) == "One sentence."
    assert own_docstring("Child", child) == ""
    assert own_docstring("Generated", generated) == ""


PACKAGE = Path(modiff.__file__).parent
STILL_TWICE = {
    "Job",
    "Layout",
    "Memory",
    "Operator",
    "blocks_of",
    "load",
    "load_scales",
    "modulated",
    "plain",
    "quantize",
    "scale_tensors",
    "segments_of",
}
"""Names that two modules still have; this set may only get smaller."""


def names_twice(files: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Public top-level functions and classes that several of the (path, source) define.

    A command carries the name of its verb, and the functions of one backend's modules are called through the backend.
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
    twice = names_twice(files)
    assert {name: paths for name, paths in twice.items() if name not in STILL_TWICE} == {}


def test_a_name_in_two_modules_is_seen_and_a_command_is_not_counted():
    files = [("a.py", "def f(): ..."), ("b.py", "class f: ..."), ("cli/f.py", "def g(): ..."), ("c.py", "def g(): ...")]
    assert names_twice(files) == {"f": ["a.py", "b.py"]}
