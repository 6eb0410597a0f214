"""One deliberate bug, as tools/mutate.py plants it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """One bug: `old` becomes `new` in `file`, and at least one test of `tests` must then fail.

    file, tests: paths from the repository root. old: text that occurs exactly once in the file. why: what would go
    wrong for a user.
    """

    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    why: str
