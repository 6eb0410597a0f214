"""Rows of text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(cells: Sequence[Sequence[str]]) -> str:
    """A head, a rule and rows of equal length; the first column starts at the left, the others end at the right."""
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    head, *lines = (
        "  ".join([name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))])
        for name, *rest in cells
    )
    return "\n".join([head, "-" * len(head), *lines])


def number(value: float | None, form: str) -> str:
    """A formatted number; a dash for None."""
    return "-" if value is None else format(value, form)
