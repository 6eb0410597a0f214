"""What a report is made of: sections of paragraphs, tables, figures and code. It knows nothing of HTML or Markdown."""

import math
from dataclasses import dataclass
from typing import Literal, Self


@dataclass(frozen=True)
class Cell:
    """One cell: the text that is shown, the number it is sorted by (None: nothing was measured), and small print."""

    text: str
    value: float | None = None
    detail: str = ""

    @classmethod
    def number(
        cls, value: float | None, form: str = ".4g", low: float | None = None, high: float | None = None
    ) -> Self:
        """A figure, its interval as small print; a dash for None and for what is not finite.

        >>> Cell.number(1.5, ".2f", 1.25, 1.75)
        Cell(text='1.50', value=1.5, detail='[1.25, 1.75]')
        """
        if value is None or not math.isfinite(value):
            return cls("-")
        detail = "" if low is None or high is None else f"[{low:{form}}, {high:{form}}]"
        return cls(f"{value:{form}}", float(value), detail)


@dataclass(frozen=True)
class Column:
    """The head of a column. numeric: aligned right and sorted by value, else by text. note: what it means."""

    title: str
    numeric: bool = True
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table with a caption; each row has a cell for every column."""

    name: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def notes(self) -> list[tuple[str, str]]:
        """What the columns mean: (titles, note), those with one note together."""
        titles: dict[str, list[str]] = {}
        for column in self.columns:
            if column.note:
                titles.setdefault(column.note, []).append(column.title)
        return [(", ".join(names), note) for note, names in titles.items()]


@dataclass(frozen=True)
class Figure:
    """A picture with a caption, as the bytes of a PNG or SVG file.

    alt: what it shows, for those who do not see it. pixels: images, enlarged to fill their column, not smoothed. half:
    two of its kind stand side by side where there is room; otherwise a narrow screen scrolls it.
    """

    name: str
    alt: str
    caption: str
    data: bytes
    kind: Literal["png", "svg"] = "png"
    pixels: bool = False
    half: bool = False


@dataclass(frozen=True)
class Verbatim:
    """Text to be shown as it is: a command, settings."""

    text: str


Content = str | Verbatim | Table | Figure
"""A paragraph, or one of the others."""


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it, in order."""

    title: str
    blocks: tuple[Content, ...]


@dataclass(frozen=True)
class Document:
    """A report. The names of its figures and tables are links and file names: small letters, digits and hyphens.

    conclusion: the result in one sentence, which stands first; lead: how to read the rest.
    """

    title: str
    lead: str
    sections: tuple[Section, ...]
    conclusion: str = ""

    def figures(self) -> list[Figure]:
        """All figures in order."""
        return [b for s in self.sections for b in s.blocks if isinstance(b, Figure)]
