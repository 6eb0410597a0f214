"""A document as one HTML file (no network, no other file, every text escaped, sortable tables), and as Markdown."""

import base64
import hashlib
import re
from html import escape
from importlib.resources import files
from pathlib import Path

from modiff.evaluate.report.document import Content, Document, Figure, Section, Table, Verbatim
from modiff.files import check_writable, write_atomically

PAGE, TEXT, FIGURES = "report.html", "report.md", "figures"
_MEDIA = {"png": "image/png", "svg": "image/svg+xml"}
FOLDED = 30
"""Rows of a table above which it opens with a click: they would hide what comes after them, on a phone above all."""
_SPECIAL = re.compile(r"([\\`*_{}\[\]#|~$])")


def write_report(document: Document, folder: Path) -> list[Path]:
    """Write report.html, which needs no other file, and report.md with its figures in figures/.

    Returns: the two.
    Raises: OSError that names the file, if one cannot be written. Each file is whole or the old one.
    """
    contents = {folder / FIGURES / f"{figure.name}.{figure.kind}": figure.data for figure in document.figures()}
    contents |= {folder / TEXT: markdown(document).encode(), folder / PAGE: html_page(document).encode()}
    for path, content in contents.items():
        check_writable(path)
        write_atomically(path, lambda file, content=content: file.write(content))
    return [folder / PAGE, folder / TEXT]


def html_page(document: Document) -> str:
    """The whole page.

    Its content security policy allows the page's own style and script by their hashes, pictures inside the file, and
    nothing else: no text in it can load or run anything, whatever a model or a config is called.
    """
    style, script = (files("modiff.evaluate.report").joinpath(name).read_text(encoding="utf-8")
                     for name in ("report.css", "report.js"))  # fmt: skip
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}"
    numbered = list(enumerate(document.sections, 1))
    links = "\n".join(f'<li><a href="#section-{i}">{escape(s.title)}</a></li>' for i, s in numbered)
    conclusion = f'<p class="conclusion">{escape(document.conclusion)}</p>\n' * bool(document.conclusion)
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
{conclusion}<p>{escape(document.lead)}</p>
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


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _section(number: int, section: Section) -> str:
    blocks = "".join(map(_block, section.blocks))
    head = f'<h2 id="section-{number}">{escape(section.title)}</h2>'
    return f'<section aria-labelledby="section-{number}">\n{head}\n<div class="flow">\n{blocks}</div>\n</section>\n'


def _block(block: Content) -> str:
    match block:
        case str():
            return f"<p>{escape(block)}</p>\n"
        case Verbatim():
            return f"<pre><code>{escape(block.text)}</code></pre>\n"
        case Table():
            return _table(block)
        case Figure():
            source = f"data:{_MEDIA[block.kind]};base64,{base64.b64encode(block.data).decode()}"
            kind, pixels = "half" if block.half else "whole", ' class="pixels"' * block.pixels
            return (
                f'<figure id="{block.name}" class="{kind}"><img{pixels} src="{source}" alt="{escape(block.alt)}">'
                f"<figcaption>{escape(block.caption)}</figcaption></figure>\n"
            )


def _table(table: Table) -> str:
    kinds = [' class="number"' if column.numeric else "" for column in table.columns]
    head = "".join(
        f'<th scope="col"{kind}><button type="button">{escape(column.title)}</button></th>'
        for kind, column in zip(kinds, table.columns, strict=True)
    )
    rows = "\n".join(f"<tr>{_row(table, i)}</tr>" for i in range(len(table.rows)))
    notes = "".join(f'<p class="note">{escape(names)}: {escape(note)}</p>\n' for names, note in table.notes())
    folds = len(table.rows) > FOLDED
    return (
        f"<details><summary>Show {len(table.rows)} rows</summary>\n"
        * folds
        + f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.caption)}">'
        f'<table id="{table.name}"><caption>{escape(table.caption)}</caption>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>\n{notes}" + "</details>\n" * folds
    )


def _row(table: Table, index: int) -> str:
    cells: list[str] = []
    for i, (column, cell) in enumerate(zip(table.columns, table.rows[index], strict=True)):
        kind = f' data-label="{escape(column.title)}"' + ' class="number"' * column.numeric
        value = "" if cell.value is None else f' data-value="{cell.value!r}"'
        names_row = i == 0 and not column.numeric
        opening, closing = ('<th scope="row">', "</th>") if names_row else (f"<td{kind}{value}>", "</td>")
        small = f"<br><small>{escape(cell.detail)}</small>" if cell.detail else ""
        cells.append(f"{opening}{escape(cell.text)}{small}{closing}")
    return "".join(cells)


def markdown(document: Document, figures: str = FIGURES) -> str:
    """The whole text for a README; figures are links to `figures`/<name>.<kind>.

    Texts are escaped: markup and HTML in a name show as they were typed. Notes of columns stand below their table.
    """
    blocks = [f"# {_text(document.title)}", _text(document.conclusion), _text(document.lead)]
    for section in document.sections:
        blocks.append(f"## {_text(section.title)}")
        blocks += [_markdown_block(block, figures) for block in section.blocks]
    return "\n\n".join(filter(None, blocks)) + "\n"


def _markdown_block(block: Content, figures: str) -> str:
    match block:
        case str():
            return _text(block)
        case Verbatim():
            longest = max((len(run) for run in re.findall(r"`+", block.text)), default=0)
            fence = "`" * max(3, longest + 1)
            return f"{fence}text\n{block.text}\n{fence}"
        case Table():
            lines = [[_text(column.title) for column in block.columns]]
            lines += [[_text(f"{cell.text} {cell.detail}") for cell in row] for row in block.rows]
            head, *rows = (f"| {' | '.join(line)} |" for line in lines)
            rule = "|" + "|".join("--:" if column.numeric else "---" for column in block.columns) + "|"
            notes = [f"{_text(names)}: {_text(note)}" for names, note in block.notes()]
            return "\n\n".join([_text(block.caption), "\n".join([head, rule, *rows]), *notes])
        case Figure():
            return f"![{_text(block.alt)}]({figures}/{block.name}.{block.kind})\n\n{_text(block.caption)}"


def _text(text: str) -> str:
    """One line in which nothing is markup."""
    shown = escape(_SPECIAL.sub(r"\\\1", " ".join(text.split())), quote=False)
    return re.sub(r"^(\d+)([.)])(?=\s)", r"\1\\\2", re.sub(r"^([-+])(?=\s)", r"\\\1", shown))
