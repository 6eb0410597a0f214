"""The glossary: words that the field does not use must not come back, neither as names nor in sentences."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "src" / "modiff").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")])
TESTED = ("generate", "cli", "experiments", "training", "methods", "checkpoint", "assets")
TESTS = sorted(path for room in TESTED for path in (ROOT / "tests" / room).glob("*.py"))
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])

NAMES = {
    "coder": "quantizer",
    "twin": "quantized layer",
    "stream": "state",
    "obstacle": "unsupported",
    "front": "fused input",
    "piece": "name the thing",
    "verdict": "decision",
}
"""Words of identifiers that are gone, also in the plural, and what to write instead."""

VAGUE = {"found", "given", "wanted", "asked"}
"""Identifiers that name nothing: name the thing."""

PHRASES = {
    r"coders?": "quantizer",
    r"twins?": "quantized layer",
    r"obstacles?": "why it is unsupported",
    r"verdicts?": "decision",
    r"anew": "again",
    r"of one's own": "your own",
    r"in the place of": "instead of",
    r"as ever": "leave it out, or say what stays true",
    r"beside": "next to, or in addition to",
    r"so many": "the number",
    r"in whatever parts": "however it is divided",
    r"learned steps?": "learned scale",
    r"step sizes? of (?:the|a) quantizer": "scale",
    r"the gate (?:leaves|picks|chooses|takes|times|decides)": "autotune",
}
"""Words of sentences that are gone: in docstrings, messages, comments and pages; and what to write instead."""


def parts(name: str) -> set[str]:
    """The words of an identifier.

    >>> sorted(parts("_SilentCoder")), sorted(parts("input_states2"))
    (['coder', 'silent'], ['2', 'input', 'states'])
    """
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)}


def names_of(source: str) -> set[str]:
    """All identifiers of a module, also those of arguments, keywords and attributes."""
    identifiers = (
        getattr(node, field, None) for node in ast.walk(ast.parse(source)) for field in ("id", "attr", "name", "arg")
    )
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
    return [
        f"{match.group()}: {instead}"
        for phrase, instead in PHRASES.items()
        for match in re.finditer(rf"\b{phrase}\b", text, re.IGNORECASE)
    ]


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_module_speaks_the_words_of_the_field(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert lost_names(source) == []
    assert names_of(source) & VAGUE <= ({"given"} if path in TESTS else set())  # hypothesis has it
    sentences = () if path in TESTS else sentences_of(source)
    assert [lost for sentence in sentences for lost in lost_phrases(sentence)] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_page_speaks_the_words_of_the_field(path: Path) -> None:
    assert lost_phrases(" ".join(path.read_text(encoding="utf-8").split())) == []


@pytest.mark.parametrize(
    ("source", "names", "phrases"),
    [
        ("class SilentCoder: ...\n", ["SilentCoder: quantizer"], []),
        ("def f(twin): return twin.stream\n", ["stream: state", "twin: quantized layer"], []),
        ("# so many, beside\n", [], ["beside: next to, or in addition to", "so many: the number"]),
        ('"""The Twin of\n   a layer."""\n', [], ["Twin: quantized layer"]),
        ("encoder = upstream = 'decoders, downstream, renewal'\n", [], []),
    ],
)
def test_words_that_are_gone_are_seen_and_others_are_not(source: str, names: list[str], phrases: list[str]) -> None:
    assert lost_names(source) == names
    assert [lost for sentence in sentences_of(source) for lost in lost_phrases(sentence)] == phrases
