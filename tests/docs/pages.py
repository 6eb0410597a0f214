"""What the code of a page says: its fenced blocks, and what of modiff they name and call."""

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from types import ModuleType
from typing import Any

FENCE = re.compile(r"^( *)(`{3,})(\w+)[^\n]*\n(.*?)^\1\2\s*$", re.MULTILINE | re.DOTALL)

LINK = re.compile(r"\]\(\s*([^)\s#]*)(?:#([^)\s]*))?\)")
REMOTE = re.compile(r"[a-z]+:")


def blocks(text: str, *languages: str) -> list[str]:
    """The bodies of the fenced blocks of these languages, also of those inside of other blocks and lists."""
    seen = []
    for match in FENCE.finditer(text):
        indent, _, language, body = match.groups()
        if language in languages:
            seen.append("".join(line.removeprefix(indent) for line in body.splitlines(keepends=True)))
    return seen


def commands(text: str) -> list[str]:
    """What a page types in a shell, lines that go on joined; in a block with prompts the other lines are output."""
    typed = []
    for block in blocks(text, "console", "bash", "sh"):
        lines = block.replace("\\\n", " ").splitlines()
        prompted = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        typed += [line.strip() for line in prompted or lines]
    return typed


def broken_links(page: Path, text: str) -> list[str]:
    """The links of a page of Markdown that lead to no file next to it, or to no heading of that file."""
    broken = []
    for address, anchor in LINK.findall(FENCE.sub("", text)):
        target = page.parent / address if address else page
        known = headings(target) if anchor and target.suffix == ".md" and target.is_file() else {anchor}
        if not REMOTE.match(address) and (not target.exists() or anchor not in known):
            broken.append(f"{address}#{anchor}" if anchor else address)
    return broken


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


class Calls(ast.NodeVisitor):
    """Looks up every name of modiff in a block, and binds the arguments of every call of one to its signature."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {}
        self.wrong: list[str] = []

    def visit_Import(self, node: ast.Import) -> None:
        for name in node.names:
            if name.name.partition(".")[0] == "modiff":
                self._bind(name.asname or "modiff", lambda full=name.name: resolve_name(full), name.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if (node.module or "").partition(".")[0] == "modiff":
            for name in node.names:
                full = f"{node.module}:{name.name}"
                self._bind(name.asname or name.name, lambda full=full: resolve_name(full), full)

    def visit_Call(self, node: ast.Call) -> None:
        function = self.value_of(node.func)
        if callable(function) and not isinstance(function, ModuleType):
            try:
                _bind_arguments(function, node)
            except TypeError as error:
                self.wrong.append(f"{ast.unparse(node.func)}: {error}")
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        owner = self.value_of(node.value)
        if isinstance(owner, ModuleType) and not hasattr(owner, node.attr):
            self.wrong.append(f"{ast.unparse(node)}: {owner.__name__} has no {node.attr}")
        self.generic_visit(node)

    def value_of(self, node: ast.expr) -> Any:
        """What a name or a chain of attributes stands for; None where it is nothing of modiff."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self.value_of(node.value)
            return None if owner is None else getattr(owner, node.attr, None)
        return None

    def _bind(self, name: str, find: Callable[[], Any], full: str) -> None:
        try:
            self.names[name] = import_module("modiff") if full.startswith("modiff.") and name == "modiff" else find()
        except (ImportError, AttributeError) as error:
            self.wrong.append(f"{full}: {error}")


def _bind_arguments(function: Callable[..., Any], node: ast.Call) -> None:
    signature = inspect.signature(function)
    starred = any(isinstance(argument, ast.Starred) for argument in node.args)
    keywords = {word.arg: None for word in node.keywords if word.arg}
    bind = signature.bind_partial if starred or len(keywords) < len(node.keywords) else signature.bind
    bind(*([] if starred else node.args), **keywords)


def wrong_names(sources: list[str]) -> Iterator[str]:
    """What the blocks of a page, from top to bottom, say of modiff that is not so."""
    calls = Calls()
    for source in sources:
        calls.visit(ast.parse(source))
    yield from calls.wrong


def imported(sources: list[str]) -> set[str]:
    """The names that blocks import from modules of modiff, in full."""
    nodes = (node for source in sources for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom))
    return {f"{n.module}.{a.name}" for n in nodes if (n.module or "").partition(".")[0] == "modiff" for a in n.names}
