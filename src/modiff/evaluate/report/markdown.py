"""A document as Markdown for a README: tables as they are, figures as files beside it."""

from __future__ import annotations

import html
import re

from modiff.evaluate.report.document import Block, Code, Document, Figure, Table

_SPECIAL = re.compile(r"([\\`*_{}\[\]#|~$])")


def markdown(document: Document, figures: str = "figures") -> str:
    """The whole text; figures are links to `figures`/<name>.<kind>.

    Texts are escaped: markup and HTML in a name show as they were typed. Notes of columns stand below their table.
    """
    parts = [f"# {_text(document.title)}", _text(document.lead)]
    for section in document.sections:
        parts.append(f"## {_text(section.title)}")
        parts += [_block(block, figures) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def file_name(figure: Figure) -> str:
    """The name of a figure's file."""
    return f"{figure.name}.{figure.kind}"


def _block(block: Block, figures: str) -> str:
    match block:
        case str():
            return _text(block)
        case Code():
            longest = max((len(run) for run in re.findall(r"`+", block.text)), default=0)
            fence = "`" * max(3, longest + 1)
            return f"{fence}text\n{block.text}\n{fence}"
        case Table():
            return _table(block)
        case Figure():
            return f"![{_text(block.alt)}]({figures}/{file_name(block)})\n\n{_text(block.caption)}"


def _table(table: Table) -> str:
    lines = [
        _line([_text(column.title) for column in table.columns]),
        "|" + "|".join("--:" if column.numeric else "---" for column in table.columns) + "|",
        *(_line([_text(f"{cell.text} {cell.detail}") for cell in row]) for row in table.rows),
    ]
    notes = [f"{_text(names)}: {_text(note)}" for names, note in table.notes()]
    return "\n\n".join([_text(table.caption), "\n".join(lines), *notes])


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _text(text: str) -> str:
    """One line in which nothing is markup."""
    plain = " ".join(text.split())
    shown = html.escape(_SPECIAL.sub(r"\\\1", plain), quote=False)
    return re.sub(r"^(\d+)([.)])(?=\s)", r"\1\\\2", re.sub(r"^([-+])(?=\s)", r"\\\1", shown))
