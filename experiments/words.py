"""Figures in sentences that stay true whatever was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def find(rows: Sequence[dict[str, Any]], /, **fields: Any) -> dict[str, Any]:
    """The first row with these fields; an empty one if there is none."""
    return next((row for row in rows if all(row.get(key) == value for key, value in fields.items())), {})


def error(row: dict[str, Any]) -> float | None:
    """Its relative L2; None if it was not measured or diverged."""
    return row.get("relative_l2")


def number(value: float | None, form: str = ".3g") -> str:
    """A figure, or "no figure" for what was not measured or diverged."""
    return "no figure" if value is None else format(value, form)


def times(value: float | None, other: float | None) -> str:
    """How many times `other` a value is, as a number.

    >>> times(3.0, 2.0), times(None, 2.0)
    ('1.5', 'an unknown number of')
    """
    if value is None or not other:
        return "an unknown number of"
    return format(value / other, ".2g" if value / other < 100 else ".0f")


def less(value: float | None, other: float | None) -> str:
    """A value beside another one, in words.

    >>> less(1.0, 4.0), less(4.0, 1.0), less(None, 1.0)
    ('4 times less', '4 times more', 'not to be compared')
    """
    if not value or not other:
        return "not to be compared"
    return f"{times(other, value)} times less" if value <= other else f"{times(value, other)} times more"


def between(values: Sequence[float | None], form: str = ".3g") -> str:
    """The smallest and the largest of some figures.

    >>> between([0.5, 0.25, None])
    '0.25 to 0.5'
    """
    known = [v for v in values if v is not None]
    if not known:
        return "no figure"
    ends = format(min(known), form), format(max(known), form)
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"
