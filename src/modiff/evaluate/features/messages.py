"""One line out of another library's error."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """What an error says in its first line, with its class.

    >>> first_line(ValueError("bad\\nand long"))
    'ValueError: bad'
    """
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
