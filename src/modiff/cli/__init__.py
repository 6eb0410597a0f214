"""The command line: parse, call, show. No logic lives here."""

from __future__ import annotations

from typing import Annotated

import typer

from modiff import __version__
from modiff.cli.analyze import analyze
from modiff.cli.demo import demo
from modiff.cli.evaluate import evaluate
from modiff.cli.explain import explain
from modiff.cli.export import export
from modiff.cli.generate import generate
from modiff.cli.quantize import quantize
from modiff.cli.sample import sample

app = typer.Typer(
    name="modiff",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
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


app.command()(analyze)
app.command()(demo)
app.command()(evaluate)
app.command()(explain)
app.command()(export)
app.command()(generate)
app.command()(quantize)
app.command()(sample)
