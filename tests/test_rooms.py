"""The house rules that no linter checks: sizes, folders, circles, budgets, words; and README keeps its word."""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from demo_table import table

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "modiff"
TREES = [PACKAGE, *(ROOT / name for name in ("bench", "experiments", "training", "tools"))]
MODULES, FUNCTION_LINES, FILE_LINES = 15, 60, 400
LINES_OF = {"src/modiff/core/recursion.py": 200}
ROOMS = {"src/modiff"}
"""A folder of rooms and of what stands above them; docs name each."""
FOLDERS = sorted(
    folder for tree in TREES for folder in (tree, *tree.rglob("*")) if folder.is_dir() and any(folder.glob("*.py"))
)
FILES = sorted(path for tree in (*TREES, ROOT / "tests") for path in tree.rglob("*.py"))
BUDGETS = {
    "experiments": (["experiments"], 2_500),
    "what judges and what is typed": ([f"src/modiff/{room}" for room in ("evaluate", "generate", "cli")], 5_860),
    "what a browser shows": (["src/modiff/web"], 1_050),
    "how it is sampled": (["src/modiff/sampling"], 2_150),
    "whose recipe": (["src/modiff/methods"], 2_200),
    "the whole package": (["src/modiff"], 27_010),
    "tests": (["tests"], 28_400),
}
"""What a room may hold, in lines of Python: (folders, lines)."""
Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def long_functions(source: str) -> Iterator[str]:
    """Functions over FUNCTION_LINES, decorators and docstring counted."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, Function):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            if (lines := (node.end_lineno or first) - first + 1) > FUNCTION_LINES:
                yield f"{node.name} has {lines} lines"


def blind_pass_through(source: str) -> Iterator[str]:
    """Functions that hand their own **kwargs on; only a wrapper made with functools.wraps has to."""
    functions = (node for node in ast.walk(ast.parse(source)) if isinstance(node, Function) and node.args.kwarg)
    for node in functions:
        wraps = any("wraps(" in ast.unparse(decorator) for decorator in node.decorator_list)
        for call in () if wraps else ast.walk(node):
            words = call.keywords if isinstance(call, ast.Call) else ()
            if any(word.arg is None and ast.unparse(word.value) == node.args.kwarg.arg for word in words):
                yield f"{node.name} passes **{node.args.kwarg.arg} on; name the arguments"


def findings(source: str, name: str) -> list[str]:
    """Everything in `source` that breaks a rule."""
    lines, most = len(source.splitlines()), LINES_OF.get(name, FILE_LINES)
    long = [f"{lines} lines, {most} is the most"] if lines > most else []
    return long if name.startswith("tests/") else [*long, *long_functions(source), *blind_pass_through(source)]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_keeps_the_house_rules(path: Path) -> None:
    assert findings(path.read_text(encoding="utf-8"), name_of(path)) == []


BODY = "    x = 1\n"


@pytest.mark.parametrize(
    ("source", "name", "seen"),
    [
        ("def f():\n" + BODY * 59, "src/a.py", ""),
        ("@g\ndef f():\n" + BODY * 59, "src/a.py", "f has 61 lines"),
        ("class C:\n    async def f(self):\n" + ("    " + BODY) * 60, "src/a.py", "f has 61 lines"),
        ("x = 1\n" * 401, "tests/a.py", "401 lines"),
        ("x = 1\n" * 201, "src/modiff/core/recursion.py", "201 lines"),
        ("def f(**options):\n    return g(1, **options)\n", "src/a.py", "f passes **options on"),
        ("@functools.wraps(g)\ndef f(*a, **options):\n    return g(*a, **options)\n", "src/a.py", ""),
    ],
)
def test_each_rule_sees_what_breaks_it_and_nothing_else(source: str, name: str, seen: str) -> None:
    result = findings(source, name)
    assert len(result) == bool(seen)
    assert all(seen in line for line in result)


def modules(folder: Path) -> list[str]:
    """Names of the modules and sub-packages of a folder."""
    files = [path.stem for path in folder.glob("*.py") if not path.stem.startswith("__")]
    return sorted([*files, *(path.name for path in folder.iterdir() if path.is_dir() and any(path.glob("*.py")))])


def families(names: Iterable[str]) -> list[tuple[str, str]]:
    """Names that are another name plus a suffix: a folder that nobody made."""
    return [(short, long) for long in names for short in names if long.startswith(f"{short}_")]


@pytest.mark.parametrize("folder", FOLDERS, ids=name_of)
def test_a_folder_holds_few_modules_and_no_prefix_families(folder: Path) -> None:
    names = modules(folder)
    assert families(names) == []
    assert len(names) <= MODULES or name_of(folder) in ROOMS


@pytest.mark.parametrize("room", BUDGETS)
def test_a_room_keeps_its_budget_of_lines(room: str) -> None:
    folders, budget = BUDGETS[room]
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
    names = {path: ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}
    sources = {name.removesuffix(".__init__"): path.read_text("utf-8") for path, name in names.items()}
    # what imports the whole package for its version stands above it
    assert circle({name: targets - {"modiff"} for name, targets in imports(sources).items()}) == []


A = "from __future__ import annotations\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.b import B\n"


@pytest.mark.parametrize(
    ("texts", "seen"),
    [
        ({"p.a": A, "p.b": "def f():\n    import p.c\n", "p.c": "from p.a import A\n"}, {"p.a", "p.b", "p.c"}),
        ({"p": "from p.a import A\n", "p.a": A, "p.b": "import os\n"}, set()),
    ],
)
def test_circles_and_families_are_seen(texts: dict[str, str], seen: set[str]) -> None:
    assert set(circle(imports(texts))) == seen
    assert families(["suite", "suite_plans", "suited"]) == [("suite", "suite_plans")]


SOURCES = sorted(path for tree in TREES for path in tree.rglob("*.py"))
TESTED = ("generate", "cli", "experiments", "training", "methods", "checkpoint", "assets")
TESTS = sorted(path for room in TESTED for path in (ROOT / "tests" / room).glob("*.py"))
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])

NAMES = {
    "coder": "quantizer",
    "twin": "quantized layer",
    "stream": "state",
    "obstacle": "unsupported",
    "front": "fused input",
    "piece": "name the thing",
    "segment": "run",
    "verdict": "decision",
}
"""Words of identifiers that are gone, also in the plural, and what to write instead."""

VAGUE = {"found", "given", "wanted", "asked"}
"""Identifiers that name nothing: name the thing."""

PHRASES = {
    **{f"{word}s?": NAMES[word] for word in ("coder", "twin", "obstacle", "verdict")},
    r"anew": "again",
    r"of one's own": "your own",
    r"in the place of": "instead of",
    r"as ever": "leave it out, or say what stays true",
    r"beside": "next to, or in addition to",
    r"so many": "the number",
    r"in whatever parts": "however it is divided",
    r"segments?": "run of channels",
    r"learned steps?": "learned scale",
    r"step sizes? of (?:the|a) quantizer": "scale",
    r"the gate (?:leaves|picks|chooses|takes|times|decides)": "autotune",
}
"""Words of sentences that are gone: in docstrings, messages, comments and pages; and what to write instead."""


def parts(name: str) -> set[str]:
    """The words of an identifier: coder and silent of _SilentCoder."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)}


def names_of(source: str) -> set[str]:
    """All identifiers of a module, also those of arguments, keywords and attributes."""
    nodes = ast.walk(ast.parse(source))
    identifiers = (getattr(node, field, None) for node in nodes for field in ("id", "attr", "name", "arg"))
    return {name for name in identifiers if isinstance(name, str)}


def sentences_of(source: str) -> Iterator[str]:
    """Every string and comment of a module, each on one line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield " ".join(node.value.split())
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string


def lost_names(source: str) -> list[str]:
    """Identifiers with a word that is gone."""
    words = ((name, word.removesuffix("s")) for name in names_of(source) for word in parts(name))
    return sorted(f"{name}: {NAMES[word]}" for name, word in words if word in NAMES)


def lost_phrases(text: str) -> list[str]:
    """Words that are gone, each with what to write instead."""
    seen = ((re.finditer(rf"\b{phrase}\b", text, re.IGNORECASE), instead) for phrase, instead in PHRASES.items())
    return [f"{match.group()}: {instead}" for matches, instead in seen for match in matches]


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=name_of)
def test_a_module_speaks_the_words_of_the_field(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert lost_names(source) == []
    assert names_of(source) & VAGUE <= ({"given"} if path in TESTS else set())  # hypothesis has it
    sentences = () if path in TESTS else sentences_of(source)
    assert [lost for sentence in sentences for lost in lost_phrases(sentence)] == []


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_a_page_speaks_the_words_of_the_field(path: Path) -> None:
    assert lost_phrases(" ".join(path.read_text(encoding="utf-8").split())) == []


@pytest.mark.parametrize(
    ("source", "names", "phrases"),
    [
        ("class _SilentCoder2: ...\n", ["_SilentCoder2: quantizer"], []),
        ("def f(twin): return twin.stream\n", ["stream: state", "twin: quantized layer"], []),
        ("# so many, beside\n", [], ["beside: next to, or in addition to", "so many: the number"]),
        ('"""The Twin of\n   a layer."""\n', [], ["Twin: quantized layer"]),
        ("encoder = upstream = 'decoders, downstream, renewal'\n", [], []),
    ],
)
def test_words_that_are_gone_are_seen_and_others_are_not(source: str, names: list[str], phrases: list[str]) -> None:
    assert lost_names(source) == names
    assert [lost for sentence in sentences_of(source) for lost in lost_phrases(sentence)] == phrases


README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(*languages: str) -> list[str]:
    """The bodies of the fenced blocks of these languages."""
    fence = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)
    return [body for language, body in fence.findall(README) if language in languages]


@pytest.mark.parametrize("source", blocks("python"), ids=lambda source: source.splitlines()[0])
def test_a_python_block_runs_as_printed(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    exec(compile(source, "README.md", "exec"), names)
    assert "modiff" in names or "pipe" in names  # a block that imports nothing shows nothing


def test_the_make_targets_of_readme_exist_and_the_two_commands_are_among_them() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    defined = set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))
    calls = re.findall(r"^\s*(?:\$ )?make\b([^#\n]*)", "\n".join(blocks("bash", "sh", "console")), re.MULTILINE)
    named = {word for call in calls for word in call.split() if re.fullmatch(r"[a-z][\w-]*", word)}
    assert {"demo", "test"} <= named <= defined


def test_the_table_of_the_demo_page_is_the_one_of_the_committed_run() -> None:
    result = json.loads((ROOT / "docs/results/demo.json").read_text(encoding="utf-8"))
    assert table(result) in (ROOT / "docs/demo.md").read_text(encoding="utf-8")
    assert len(README.splitlines()) <= 150
