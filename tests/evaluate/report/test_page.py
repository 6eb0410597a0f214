"""The page and the Markdown: self-contained, well-formed, every text in them is text, each file whole."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from pathlib import Path

from modiff.evaluate.report.document import Document, Section
from modiff.evaluate.report.page import html_page, markdown, write_report
from tests.evaluate.report.documents import NASTY, document, png


def test_nothing_is_loaded_from_elsewhere_and_texts_show_as_they_were_typed() -> None:
    page = html_page(document(NASTY))
    links = re.findall(r'<[^>]*?\s(?:src|href|data|srcset|action)="([^"]*)"', page)
    assert len(links) == 5
    assert all(link.startswith(("data:", "#section-")) for link in links)
    assert not re.search(r"url\(|@import|https?:", re.sub(r"data:[^\"]*", "", page).replace("&", ""))
    # title and its heading, lead, link and heading of a section, paragraph, code, 2 captions, head, cell, note;
    # as attributes a picture's text and a table's label
    assert page.count(html.escape(NASTY)) == 15
    assert NASTY not in page
    assert page.count("<script") == 1


def test_the_policy_allows_the_pages_own_script_and_style_and_no_other() -> None:
    page = html_page(document())
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert "unsafe" not in policy
    assert policy.startswith("default-src 'none'; img-src data:;")
    for tag in ("style", "script"):
        (body,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() in policy
    assert not re.search(r"\son\w+=|\sstyle=", page)


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


def test_a_paragraph_stays_one() -> None:
    typed = ("- no list", "+ no list", "3. no list", "-3 is a number", "3.5 is one too", "# head", "two\n\nlines")
    text = markdown(Document("T", "L", (Section("S", typed),))).partition("## S\n\n")[2]
    shown = r"\- no list|\+ no list|3\. no list|-3 is a number|3.5 is one too|\# head|two lines"
    assert text.rstrip("\n").split("\n\n") == shown.split("|")


def test_it_writes_page_text_and_figures(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "report"
    page, text = write_report(document(), folder)
    assert (page.name, text.name) == ("report.html", "report.md")
    assert page.read_text(encoding="utf-8") == html_page(document())
    assert text.read_text(encoding="utf-8") == markdown(document(), "figures")
    assert (folder / "figures" / "dots.png").read_bytes() == png()
    assert sorted(p.name for p in folder.rglob("*")) == ["dots.png", "figures", "lines.svg", "report.html", "report.md"]
