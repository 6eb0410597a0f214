"""The command line: parse, call, show. No logic lives here. A user's mistake is one line on stderr, no traceback."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from modiff import __version__
from modiff.cli.evaluate import evaluate
from modiff.cli.generate import export, generate, sample
from modiff.cli.measure import analyze, demo, explain
from modiff.cli.quantize import quantize
from modiff.errors import ModiffError

MISTAKE, INTERRUPTED = 2, 130


class Commands(TyperGroup):
    """Our errors and failed files become exit code 2, Ctrl-C 130, each with one line; bugs keep their traceback."""

    def invoke(self, ctx: typer.Context) -> Any:
        """Run a command, the reading of its options included."""
        try:
            return super().invoke(ctx)
        except ModiffError as error:  # the first line: what follows is detail for those who call from Python
            _stop(str(error).partition("\n")[0], MISTAKE, error)
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


app = typer.Typer(
    name="modiff",
    cls=Commands,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(show: bool) -> None:
    if show:
        typer.echo(f"modiff {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Modulated quantization of diffusion models: code the change between denoising steps, not the activation.

    \b
    Example:
        modiff demo
    """


for command in (analyze, demo, evaluate, explain, export, generate, quantize, sample):
    app.command()(command)
