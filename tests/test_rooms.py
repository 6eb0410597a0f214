"""The house rules that a tree of files can check: few modules in a folder, no prefix families, no circles, budgets."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "modiff"
MODULES = 15
ROOMS = {"src/modiff"}
"""A folder of rooms and of what stands above them; docs name each."""
FOLDERS = sorted(
    folder
    for tree in (PACKAGE, *(ROOT / name for name in ("bench", "experiments", "training", "tools")))
    for folder in (tree, *tree.rglob("*"))
    if folder.is_dir() and any(folder.glob("*.py"))
)
BUDGETS = {"experiments": (["experiments"], 2_500), "generate": (["src/modiff/generate", "src/modiff/cli"], 2_200)}
"""What a part may hold, in lines of Python: (folders, lines)."""


def modules(folder: Path) -> list[str]:
    """Names of the modules and sub-packages of a folder."""
    files = [path.stem for path in folder.glob("*.py") if not path.stem.startswith("__")]
    return sorted([*files, *(path.name for path in folder.iterdir() if path.is_dir() and any(path.glob("*.py")))])


def families(names: Iterable[str]) -> list[tuple[str, str]]:
    """Names that are another name plus a suffix: a folder that nobody made."""
    return [(short, long) for long in names for short in names if long.startswith(f"{short}_")]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.relative_to(ROOT).as_posix())
def test_a_folder_holds_few_modules_and_no_prefix_families(folder: Path) -> None:
    names = modules(folder)
    assert families(names) == []
    assert len(names) <= MODULES or folder.relative_to(ROOT).as_posix() in ROOMS


@pytest.mark.parametrize("part", BUDGETS)
def test_a_part_keeps_its_budget_of_lines(part: str) -> None:
    folders, budget = BUDGETS[part]
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files) <= budget


def imports(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """What each module imports of the others anywhere in it, also behind TYPE_CHECKING and inside of functions."""
    graph: dict[str, set[str]] = {}
    for name, source in sources.items():
        targets: set[str] = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.module:
                whole = {alias: f"{node.module}.{alias.name}" for alias in node.names}
                targets |= {whole[alias] if whole[alias] in sources else node.module for alias in node.names}
            elif isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
        graph[name] = (targets & set(sources)) - {name}
    return graph


def circles(graph: Mapping[str, set[str]]) -> list[str]:
    """Modules from which imports lead back to themselves."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        stack = list(graph[start])
        while stack:
            name = stack.pop()
            if name not in seen:
                seen.add(name)
                stack += graph[name]
        return seen

    return [name for name in graph if name in reached(name)]


def sources() -> dict[str, str]:
    texts: dict[str, str] = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        texts[name] = path.read_text(encoding="utf-8")
    return texts


def test_imports_have_no_circles_also_for_type_checkers() -> None:
    # what imports the whole package for its version stands above it
    graph = {name: targets - {"modiff"} for name, targets in imports(sources()).items()}
    assert circles(graph) == []


A = "from __future__ import annotations\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.b import B\n"


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        ({"p.a": A, "p.b": "from p import a\n"}, ["p.a", "p.b"]),
        ({"p.a": A, "p.b": "def f():\n    import p.c\n", "p.c": "from p.a import A\n"}, ["p.a", "p.b", "p.c"]),
        ({"p": "from p.a import A\n", "p.a": A, "p.b": "import os\n"}, []),
    ],
)
def test_circles_are_seen(texts: dict[str, str], found: list[str]) -> None:
    assert circles(imports(texts)) == found


def test_families_are_seen() -> None:
    assert families(["suite", "suite_plans", "suited"]) == [("suite", "suite_plans")]
