"""Tables of the study from its rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from modiff.evaluate.report.document import Cell, Column, Table

Row = dict[str, Any]

L2_NOTE = "relative L2 to the reference, 95 % interval over the images"


def listing(name: str, caption: str, rows: Sequence[Row], columns: Sequence[tuple[str, str, str]]) -> Table:
    """A line for each row. columns: (field, title, format); format "" is text, "l2" a relative L2 with its interval."""
    heads = tuple(Column(title, bool(form), L2_NOTE if form == "l2" else "") for _, title, form in columns)
    return Table(name, caption, heads, tuple(tuple(_cell(row, key, form) for key, _, form in columns) for row in rows))


def crossed(
    name: str,
    caption: str,
    rows: Sequence[Row],
    *,
    down: tuple[str, str],
    across: str,
    titles: dict[Any, str] | None = None,
    psnr: bool = True,
) -> Table:
    """Relative L2 and PSNR with one field of the rows down and one across; the last row of a place counts.

    Args:
        down: (field, title) of the first column. across: field of the others. titles: of its values.
    """
    lines = list(dict.fromkeys(row[down[0]] for row in rows))
    heads = list(dict.fromkeys(row[across] for row in rows))
    places = {(row[down[0]], row[across]): row for row in rows}
    numeric = all(isinstance(line, int | float) for line in lines)
    columns = (Column(down[1], numeric), *(Column((titles or {}).get(head, str(head))) for head in heads))
    body = tuple(
        (Cell(str(line), float(line) if numeric else None), *(_error(places.get((line, head)), psnr) for head in heads))
        for line in lines
    )
    return Table(name, caption, columns, body)


def _error(row: Row | None, psnr: bool) -> Cell:
    if row is None:
        return Cell("")
    if row["relative_l2"] is None:
        return Cell("diverged")
    decibels = f"{row['psnr_db']:.1f} dB" if psnr and row["psnr_db"] is not None else ""
    return Cell(f"{row['relative_l2']:.4f}", row["relative_l2"], decibels)


def _cell(row: Row, key: str, form: str) -> Cell:
    value = row.get(key)
    if form == "":
        return Cell("" if value is None else str(value))
    if form == "l2":
        return Cell.number(value, ".4f", row["low"], row["high"]) if value is not None else Cell("diverged")
    return Cell.number(value, form)
