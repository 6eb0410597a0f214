"""What an experiment is, and how its values become sentences, tables and sections of a report."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from experiments.lab import Lab, Row
from modiff.evaluate.report.document import Cell, Column, Content, Section, Table, Verbatim

Values = dict[str, Any]
"""What an experiment measured, as plain JSON values."""
L2_NOTE = "relative L2 to the reference, 95 % interval over the images"


class Shown(NamedTuple):
    """What came out, as blocks of a report, the first a sentence; and why it is not what was printed."""

    blocks: tuple[Content, ...]
    why: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One experiment.

    name: what a command calls it; also: its other names, such as those of further tables. printed: what the paper says.
    measure: computes the values. show: presents them, from their JSON alone.
    """

    name: str
    title: str
    printed: tuple[Content, ...]
    measure: Callable[[Lab], Values]
    show: Callable[[Values], Shown]
    also: tuple[str, ...] = ()

    def section(self, values: Values, command: str) -> Section:
        """A section of a report: what the paper says, what came out, why they differ, and what to type."""
        shown = self.show(values)
        led = ("The paper: ", self.printed), ("Here: ", shown.blocks), ("Why they differ: ", shown.why)
        blocks = [block for words, part in led for block in (words + str(part[0]), *part[1:])]
        return Section(self.title, (*blocks, Verbatim(command)))


def printed_table(name: str, caption: str, head: str, rows: Sequence[str]) -> Table:
    """A table as it was printed; `|` separates cells, all of them text."""
    columns = tuple(Column(title.strip(), numeric=False) for title in head.split("|"))
    return Table(name, caption, columns, tuple(tuple(Cell(c.strip()) for c in row.split("|")) for row in rows))


def listing(name: str, caption: str, rows: Sequence[Row], columns: str) -> Table:
    """A line for each row.

    columns: `field: format = title`, separated by `;`. Without a format the cells are text, with l2 they are a relative
        L2 with its interval; without a title it is the field's name.
    """
    fields = [_column(text) for text in columns.split(";")]
    heads = tuple(Column(title, bool(form), L2_NOTE if form == "l2" else "") for _, form, title in fields)
    return Table(name, caption, heads, tuple(tuple(_cell(row, key, form) for key, form, _ in fields) for row in rows))


def _column(text: str) -> tuple[str, str, str]:
    left, _, title = (part.strip() for part in text.partition("="))
    key, _, form = (part.strip() for part in left.partition(":"))
    return key, form, title or key


def crossed(
    name: str, caption: str, rows: Sequence[Row], *, down: str, across: str, title: str = "", head: str = "{}"
) -> Table:
    """Relative L2 and PSNR with one field of the rows down and another one across.

    Args: title: of the first column, the field's name when left out. head: of the others, `{}` the field's value.
    """
    lines, heads = (list(dict.fromkeys(row[field] for row in rows)) for field in (down, across))
    cells = {(row[down], row[across]): _error(row) for row in rows}
    numeric = all(isinstance(line, int | float) for line in lines)
    columns = (Column(title or down, numeric), *(Column(head.format(value)) for value in heads))
    body = tuple(
        (Cell(str(line), float(line) if numeric else None), *(cells.get((line, value), Cell("")) for value in heads))
        for line in lines
    )
    return Table(name, caption, columns, body)


def _error(row: Row) -> Cell:
    if row["relative_l2"] is None:
        return Cell("diverged")
    decibels = f"{row['psnr_db']:.1f} dB" if row["psnr_db"] is not None else ""
    return Cell(f"{row['relative_l2']:.4f}", row["relative_l2"], decibels)


def _cell(row: Row, key: str, form: str) -> Cell:
    value = row.get(key)
    if form == "":
        return Cell("" if value is None else str(value))
    if form == "l2":
        return Cell.number(value, ".4f", row["low"], row["high"]) if value is not None else Cell("diverged")
    return Cell.number(value, form)


def error(rows: Sequence[Row], **fields: Any) -> float | None:
    """The relative L2 of the first row with these fields; None if there is none, or if it diverged."""
    return next((row["relative_l2"] for row in rows if all(row.get(key) == fields[key] for key in fields)), None)


def number(value: float | None) -> str:
    """A figure, or "no figure" for what was not measured or diverged."""
    return "no figure" if value is None else f"{value:.3g}"


def times(value: float | None, other: float | None) -> str:
    """How many times `other` a value is.

    >>> times(3.0, 2.0), times(None, 2.0)
    ('1.5', 'an unknown number of')
    """
    if value is None or not other:
        return "an unknown number of"
    return format(value / other, ".2g" if value / other < 100 else ".0f")
