"""The Markdown quantized: tables, figures beside it, and no text that becomes markup."""

from __future__ import annotations

import re

import pytest

from modiff.evaluate.report.document import Cell, Code, Column, Document, Section, Table
from modiff.evaluate.report.markdown import markdown
from tests.evaluate.report.documents import NASTY, document


def of(block: object) -> str:
    return markdown(Document("T", "L", (Section("S", (block,)),))).partition("## S\n\n")[2].rstrip("\n")  # type: ignore[arg-type]


def test_headings_paragraphs_figures_and_tables() -> None:
    text = markdown(document(), "pictures")
    assert text.startswith(
        "# Title plain\n\nLead plain\n\n## First plain\n\nplain\n\n```text\nmodiff evaluate plain\n```"
    )
    assert "![Dots plain.](pictures/dots.png)\n\nCaption plain" in text
    assert "![Lines.](pictures/lines.svg)" in text
    assert (
        "Some numbers.\n\n| name | value | other |\n|---|--:|--:|\n| b2 | 10 \\[9, 11\\] | 1 |\n| a | - | 2 |\n"
        "| b10 | -2 | 3 |\n| c | 1.5 | - |\n\nvalue, other: What it is."
    ) in text


def test_no_text_becomes_markup() -> None:
    text = markdown(document(NASTY))
    without_code = re.sub(r"^```text\n.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert "<" not in without_code
    bare = re.sub(r"\\.", "", re.sub(r"!\[[^\n]*\]\((figures/[\w.-]+)\)", "", without_code))
    assert not re.search(r"[`*\[\]$]", bare)
    rows = [line for line in without_code.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) in (2, 4) for row in rows)


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        ("- no list", "\\- no list"),
        ("+ no list", "\\+ no list"),
        ("3. no list", "3\\. no list"),
        ("-3 is a number", "-3 is a number"),
        ("3.5 is one too", "3.5 is one too"),
        ("# no heading", "\\# no heading"),
        ("two\n\nparagraphs", "two paragraphs"),
    ],
)
def test_a_paragraph_stays_one(typed: str, shown: str) -> None:
    assert of(typed) == shown


def test_code_with_fences_gets_a_longer_fence() -> None:
    assert of(Code("a\n````\nb")) == "`````text\na\n````\nb\n`````"


def test_a_cell_stays_in_its_column() -> None:
    table = Table("t", "c", (Column("a|b", numeric=False),), ((Cell("x|y\nz"),),))
    assert of(table) == "c\n\n| a\\|b |\n|---|\n| x\\|y z |"
