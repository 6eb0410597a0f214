"""A user's mistake is one line on stderr and exit code 2, never a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from modiff.errors import ModiffError

MISTAKE, INTERRUPTED = 2, 130


@contextmanager
def errors_as_exit_code() -> Iterator[None]:
    """Our errors and failed files become exit code 2, Ctrl-C 130, each with one line; bugs keep their traceback."""
    try:
        yield
    except ModiffError as error:
        _stop(_one_line(str(error)), MISTAKE, error)
    except BrokenPipeError:  # `modiff ... | head`: click ends quietly
        raise
    except OSError as error:
        _stop(
            f"{error.filename or 'output'}: expected a file that can be written, got {error.strerror or error}. "
            "Nothing was left half done. Free some space, or give another path.",
            MISTAKE,
            error,
        )
    except KeyboardInterrupt as error:
        _stop("interrupted. Files that were finished are kept.", INTERRUPTED, error)


def _stop(message: str, code: int, cause: BaseException) -> None:
    typer.echo(f"modiff: {message}", err=True)
    raise typer.Exit(code) from cause


def _one_line(message: str) -> str:
    """The first line: what follows is detail for those who call from Python."""
    return message.partition("\n")[0]
