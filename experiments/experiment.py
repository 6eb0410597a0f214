"""What an experiment of the study is: what was printed, how to measure it, and how to show what was found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from experiments.lab import Lab
from modiff.evaluate.report.document import Block, Cell, Code, Column, Section, Table

Values = dict[str, Any]
"""What an experiment found, as plain JSON values."""


class Shown(NamedTuple):
    """Tables and figures with what they mean, and why they are not what was printed."""

    found: tuple[Block, ...]
    why: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One experiment.

    name: what a command calls it; also: other names of it, such as those of further tables. printed: what the paper
    says. measure: finds the values. show: draws them, from their JSON alone.
    """

    name: str
    title: str
    printed: tuple[Block, ...]
    measure: Callable[[Lab], Values]
    show: Callable[[Values], Shown]
    also: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StudySection:
    """An experiment that was done, ready to be shown."""

    name: str
    title: str
    printed: tuple[Block, ...]
    found: tuple[Block, ...]
    why: tuple[str, ...]
    command: str

    @property
    def summary(self) -> str:
        """What was found, in the first paragraph."""
        return next((block for block in self.found if isinstance(block, str)), "")

    def section(self) -> Section:
        """As a section of a report."""
        blocks = (*_led("The paper: ", self.printed), *_led("Here: ", self.found), *_led("Why they differ: ", self.why))
        return Section(self.title, (*blocks, Code(self.command)))


def _led(words: str, blocks: Sequence[Block]) -> list[Block]:
    """The blocks, with words before the first if it is a paragraph."""
    first, *others = blocks
    return [words + first if isinstance(first, str) else first, *others]


def printed_table(name: str, caption: str, head: str, rows: Sequence[str]) -> Table:
    """A table as it was printed; cells between `|`. The first column is a name, the others are text, too."""
    columns = tuple(Column(title.strip(), numeric=False) for title in head.split("|"))
    return Table(name, caption, columns, tuple(tuple(Cell(c.strip()) for c in row.split("|")) for row in rows))
