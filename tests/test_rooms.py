"""The house rules that a tree of files can check: few modules in a folder, no prefix families, no circles, budgets."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
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
BUDGETS = {"experiments": (["experiments"], 2_500), "generate": (["src/modiff/generate", "src/modiff/cli"], 1_700)}
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


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Modules whose imports lead in a circle; empty where there is none."""
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return error.args[1]
    return []


def test_imports_have_no_circles_also_for_type_checkers() -> None:
    sources = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path.read_text(
            "utf-8"
        )
        for path in PACKAGE.rglob("*.py")
    }
    # what imports the whole package for its version stands above it
    assert circle({name: targets - {"modiff"} for name, targets in imports(sources).items()}) == []


A = "from __future__ import annotations\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.b import B\n"


@pytest.mark.parametrize(
    ("texts", "seen"),
    [
        ({"p.a": A, "p.b": "from p import a\n"}, {"p.a", "p.b"}),
        ({"p.a": A, "p.b": "def f():\n    import p.c\n", "p.c": "from p.a import A\n"}, {"p.a", "p.b", "p.c"}),
        ({"p": "from p.a import A\n", "p.a": A, "p.b": "import os\n"}, set()),
    ],
)
def test_circles_are_seen(texts: dict[str, str], seen: set[str]) -> None:
    assert set(circle(imports(texts))) == seen
    assert families(["suite", "suite_plans", "suited"]) == [("suite", "suite_plans")]
