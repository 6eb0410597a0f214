"""Run a command in this process, and what all mistakes have in common."""

from click.testing import Result
from typer.testing import CliRunner

from modiff.cli import app


def modiff(*words: object) -> Result:
    """`modiff WORDS`."""
    return CliRunner().invoke(app, [str(word) for word in words])


def done(result: Result) -> Result:
    """The result of a command that succeeded."""
    assert result.exit_code == 0, result.output
    return result


def assert_one_line(result: Result, message: str, code: int = 2) -> None:
    """One line on stderr that holds the message, no traceback, and the exit code."""
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("modiff: ")]
    assert len(lines) == 1, result.stderr
    assert message in lines[0]
