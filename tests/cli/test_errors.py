"""Exit codes: 2 and one line for a mistake, 130 for Ctrl-C, a traceback for a bug."""

from __future__ import annotations

import errno

import pytest
import typer

from modiff.cli.errors import errors_as_exit_code
from modiff.errors import ConfigError, FormatError


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("bits: expected 2 to 8, got 1."), 2, "modiff: bits: expected 2 to 8, got 1.\n"),
        (FormatError("a: expected b.\nmore\ndetail"), 2, "modiff: a: expected b.\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out.png"),
            2,
            "modiff: out.png: expected a file that can be written, got No space left on device. Nothing was left half "
            "done. Free some space, or give another path.\n",
        ),
        (KeyboardInterrupt(), 130, "modiff: interrupted. Files that were finished are kept.\n"),
    ],
)
def test_an_error_becomes_one_line_and_a_code(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as stopped, errors_as_exit_code():
        raise error
    assert stopped.value.exit_code == code
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize("error", [ZeroDivisionError, RuntimeError, BrokenPipeError])
def test_a_bug_and_a_closed_pipe_go_through(error: type[Exception]) -> None:
    with pytest.raises(error), errors_as_exit_code():
        raise error
