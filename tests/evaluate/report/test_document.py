"""A document is checked when it is made: what a page could not show is an error there."""

from __future__ import annotations

import math

import pytest

from modiff.evaluate.report.document import Cell
from tests.evaluate.report.documents import table


@pytest.mark.parametrize(
    ("arguments", "text", "value", "detail"),
    [
        ((1.25,), "1.25", 1.25, ""),
        ((1234.5, ",.0f"), "1,234", 1234.5, ""),
        ((0.5, ".2f", 0.25, 0.75), "0.50", 0.5, "[0.25, 0.75]"),
        ((0.5, ".2f", None, 0.75), "0.50", 0.5, ""),
        ((3, "d"), "3", 3.0, ""),
        ((None,), "-", None, ""),
        ((math.inf,), "-", None, ""),
        ((math.nan, ".2f", 0.0, 1.0), "-", None, ""),
    ],
)
def test_numbers_as_cells(arguments: tuple[float | None, ...], text: str, value: float | None, detail: str) -> None:
    assert Cell.number(*arguments) == Cell(text, value, detail)  # type: ignore[arg-type]


def test_notes_of_one_wording_stand_together() -> None:
    assert table().notes() == [("value, other", "What it is.")]
