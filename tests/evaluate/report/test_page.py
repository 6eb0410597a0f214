"""The page as text: self-contained, well-formed, and every text in it is text."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

from modiff.evaluate.report.page import html_page
from tests.evaluate.report.documents import NASTY, document, png

VOID = {"meta", "link", "img", "br"}


class Reader(HTMLParser):
    """Elements with their attributes, texts, and whether every element is closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_elements_are_closed_in_order_and_there_is_one_of_each_part() -> None:
    reader = Reader(html_page(document(NASTY)))
    assert reader.open == []
    for tag in ("html", "title", "style", "script", "main", "h1", "nav"):
        assert len(reader.all(tag)) == 1, tag


def test_nothing_is_loaded_from_elsewhere() -> None:
    page = html_page(document(NASTY))
    reader = Reader(page)
    for tag, attributes in reader.elements:
        for name in ("src", "href", "data", "srcset", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#section-")), (tag, value)
    assert not re.search(r"url\(|@import|https?:", re.sub(r"data:[^\"]*", "", page).replace("&", ""))


def test_the_policy_allows_the_pages_own_script_and_style_and_no_other() -> None:
    page = html_page(document())
    (policy,) = [a["content"] for a in Reader(page).all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert "unsafe" not in policy
    assert policy.startswith("default-src 'none'; img-src data:;")
    for tag in ("style", "script"):
        (body,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() in policy
    assert not re.search(r"\son\w+=|\sstyle=", page)


def test_texts_show_as_they_were_typed_everywhere() -> None:
    reader = Reader(html_page(document(NASTY)))
    shown = "\n".join(reader.texts)
    # title and its heading, lead, link and heading of a section, paragraph, code, 2 captions, head, cell, note
    assert shown.count(NASTY) == 13
    assert [a["alt"] for a in reader.all("img")] == [f"Dots {NASTY}.", "Lines."]
    assert len(reader.all("script")) == 1


def test_figures_are_the_bytes_given() -> None:
    sources = [a["src"] or "" for a in Reader(html_page(document())).all("img")]
    assert sources[0] == f"data:image/png;base64,{base64.b64encode(png()).decode()}"
    assert sources[1].startswith("data:image/svg+xml;base64,")


def test_cells_carry_what_they_are_sorted_by() -> None:
    page = html_page(document())
    assert '<td class="number" data-value="10.0">10<br><small>[9, 11]</small></td>' in page
    assert '<td class="number">-</td>' in page
    assert '<th scope="row">b10</th>' in page


def test_links_lead_to_the_sections() -> None:
    reader = Reader(html_page(document()))
    ids = {attributes.get("id") for _, attributes in reader.elements}
    links = [a["href"] or "" for a in reader.all("a")]
    assert links == ["#section-1", "#section-2"]
    assert {link[1:] for link in links} <= ids


def test_the_same_document_is_the_same_page() -> None:
    assert html_page(document()) == html_page(document())
