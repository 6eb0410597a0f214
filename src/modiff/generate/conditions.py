"""What each image is drawn of: a prompt or a class by its index, however a set is divided."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modiff.errors import ConfigError
from modiff.files import reading

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
MOST_LABELS = 100_000


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Prompts and class labels that the images take in turn: image i has number i modulo their number. Empty: none."""

    prompts: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"prompts": list(self.prompts) or None, "labels": list(self.labels) or None}

    def prompts_of(self, indices: Sequence[int]) -> list[str] | None:
        """The prompt of each index; None if there are none.

        >>> Conditions(prompts=("a", "b", "c")).prompts_of([2, 3, 7])
        ['c', 'a', 'b']
        """
        return [self.prompts[i % len(self.prompts)] for i in indices] if self.prompts else None

    def labels_of(self, indices: Sequence[int]) -> list[int] | None:
        """The class of each index; None if there are none."""
        return [self.labels[i % len(self.labels)] for i in indices] if self.labels else None


def parse_labels(text: str) -> tuple[int, ...]:
    """Labels as they are typed: numbers and ranges between commas, both ends in.

    Raises: ConfigError for anything else, a range that falls, or more than 100,000 labels.

    >>> parse_labels("0-3,7")
    (0, 1, 2, 3, 7)
    """
    labels: list[int] = []
    for typed in text.split(","):
        match = _RANGE.fullmatch(typed.strip())
        first, last = (0, -1) if match is None else (int(match[1]), int(match[2] or match[1]))
        if last < first or len(labels) + last - first >= MOST_LABELS:
            raise ConfigError(
                f"--labels: expected numbers and ranges between commas, got {typed.strip()[:40]!r} in {text[:40]!r}. "
                "Image i gets the one at i modulo their number. Use for example --labels 0-9 or --labels 3,5,8."
            )
        labels += range(first, last + 1)
    return tuple(labels)


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts in a text file, one a line; lines of nothing but spaces do not count.

    Raises: FormatError if it cannot be read as UTF-8, or holds no prompt.
    """
    with reading(path, "a text file with a prompt in each line", "Write the prompts into it, in UTF-8."):
        lines = path.read_text(encoding="utf-8").splitlines()
        prompts = tuple(line.strip() for line in lines if line.strip())
        if not prompts:
            raise ValueError("none")
    return prompts
