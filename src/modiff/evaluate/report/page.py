"""A document as one HTML file: no network, no other file, every text escaped, sortable tables."""

from __future__ import annotations

import base64
import hashlib
from html import escape
from importlib.resources import files

from modiff.evaluate.report.document import Block, Code, Column, Document, Figure, Section, Table

_MEDIA = {"png": "image/png", "svg": "image/svg+xml"}


def html_page(document: Document) -> str:
    """The whole page.

    Its content security policy allows the page's own style and script by their hashes, pictures inside the file, and
    nothing else: no text in it can load or run anything, whatever a model or a config is called.
    """
    style, script = _asset("report.css"), _asset("report.js")
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}"
    numbered = list(enumerate(document.sections, 1))
    links = "\n".join(f'<li><a href="#section-{i}">{escape(s.title)}</a></li>' for i, s in numbered)
    sections = "".join(_section(number, section) for number, section in numbered)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(document.title)}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{escape(document.title)}</h1>
<p>{escape(document.lead)}</p>
<nav aria-label="Sections"><ul>
{links}
</ul></nav>
</header>
<main>
{sections}</main>
<script>{script}</script>
</body>
</html>
"""


def _asset(name: str) -> str:
    return files("modiff.evaluate.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _section(number: int, section: Section) -> str:
    blocks = "".join(map(_block, section.blocks))
    head = f'<h2 id="section-{number}">{escape(section.title)}</h2>'
    return f'<section aria-labelledby="section-{number}">\n{head}\n<div class="flow">\n{blocks}</div>\n</section>\n'


def _block(block: Block) -> str:
    match block:
        case str():
            return f"<p>{escape(block)}</p>\n"
        case Code():
            return f"<pre><code>{escape(block.text)}</code></pre>\n"
        case Table():
            return _table(block)
        case Figure():
            return _figure(block)


def _figure(figure: Figure) -> str:
    source = f"data:{_MEDIA[figure.kind]};base64,{base64.b64encode(figure.data).decode()}"
    half, pixels = (' class="half"' if figure.half else ""), (' class="pixels"' if figure.pixels else "")
    return (
        f'<figure id="{figure.name}"{half}><img{pixels} src="{source}" alt="{escape(figure.alt)}">'
        f"<figcaption>{escape(figure.caption)}</figcaption></figure>\n"
    )


def _table(table: Table) -> str:
    head = "".join(map(_head, table.columns))
    rows = "\n".join(f"<tr>{_row(table, i)}</tr>" for i in range(len(table.rows)))
    notes = "".join(f'<p class="note">{escape(names)}: {escape(note)}</p>\n' for names, note in table.notes())
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.caption)}">'
        f'<table id="{table.name}"><caption>{escape(table.caption)}</caption>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>\n{notes}"
    )


def _head(column: Column) -> str:
    kind = ' class="number"' if column.numeric else ""
    return f'<th scope="col"{kind}><button type="button">{escape(column.title)}</button></th>'


def _row(table: Table, index: int) -> str:
    cells: list[str] = []
    for place, (column, cell) in enumerate(zip(table.columns, table.rows[index], strict=True)):
        kind = ' class="number"' if column.numeric else ""
        value = "" if cell.value is None else f' data-value="{cell.value!r}"'
        names_row = place == 0 and not column.numeric
        opening, closing = ('<th scope="row">', "</th>") if names_row else (f"<td{kind}{value}>", "</td>")
        small = f"<br><small>{escape(cell.detail)}</small>" if cell.detail else ""
        cells.append(f"{opening}{escape(cell.text)}{small}{closing}")
    return "".join(cells)
