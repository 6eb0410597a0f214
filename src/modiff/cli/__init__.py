"""The command line: parse, call, show. No logic lives here. A user's mistake is one line on stderr, no traceback."""

import errno
import inspect
import re
import typing
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from modiff import __version__
from modiff.cli import options
from modiff.cli.accelerate import accelerate
from modiff.cli.evaluate import evaluate
from modiff.cli.generate import export, generate, sample
from modiff.cli.measure import analyze, demo, explain
from modiff.cli.quantize import quantize
from modiff.cli.ui import ui
from modiff.config import check
from modiff.errors import ModiffError, ModiffWarning
from modiff.generate.job import check_counts
from modiff.presets import FULL_PRECISION
from modiff.progress import Bar

MISTAKE, INTERRUPTED = 2, 130
COUNTS = ("num_images", "steps", "batch_size", "shard_size", "threads", "workers")
_NUMBERS: dict[Any, tuple[str, str]] = {int: ("a whole number", "50"), float: ("a number", "0.5")}
VERSION_HELP = "Print the version and stop."


class Commands(TyperGroup):
    """Our errors and failed files become exit code 2, Ctrl-C 130, each with one line; bugs keep their traceback."""

    def invoke(self, ctx: typer.Context) -> Any:
        """Run a command, the reading of its options included."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of libraries
                warnings.filterwarnings("default", category=ModiffWarning)
                warnings.showwarning = _remark
                return super().invoke(ctx)
        except ModiffError as error:  # the first line: what follows is detail for those who call from Python
            command = self.commands[ctx.invoked_subcommand or ""]
            flags = {option.name: max(option.opts, key=len) for option in command.params if option.name}
            flags = {name.removesuffix("s"): flag for name, flag in flags.items()} | flags
            _stop(in_flags(str(error).partition("\n")[0], flags), MISTAKE, error)
        except BrokenPipeError:  # `modiff ... | head`: click ends quietly
            raise
        except OSError as error:
            got = f"{error.filename or 'output'}: expected a file that can be written, got {error.strerror or error}"
            advice = "Free some space, or give" if error.errno == errno.ENOSPC else "Give"
            _stop(f"{got}. Nothing was left half done. {advice} another path.", MISTAKE, error)
        except KeyboardInterrupt as error:
            _stop("interrupted. Files that were finished are kept.", INTERRUPTED, error)


class Command(TyperCommand):
    """Refuses numbers and paths that mean nothing before anything is loaded."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        """Read the options; what is no number or no path is one line, as all mistakes are."""
        texts, _, _ = self.make_parser(ctx).parse_args(args=list(args))
        hints = typing.get_type_hints(inspect.unwrap(self.callback)) if self.callback else {}
        for name, text in texts.items():
            if isinstance(text, str):
                _check_text(name, text, hints.get(name))
        return super().parse_args(ctx, args)

    def invoke(self, ctx: typer.Context) -> Any:
        """Run the command."""
        check_counts({name: ctx.params.get(name) for name in COUNTS}, ctx.params.get("seed") or 0)
        return super().invoke(ctx)


def _check_text(name: str, text: str, hint: Any) -> None:
    for kind in typing.get_args(hint) or (hint,):
        if kind in _NUMBERS:
            expected, example = _NUMBERS[kind]
            try:
                kind(text)
            except ValueError:
                check(name, text, False, expected, f"It cannot be read as one. Use {name}={example}.")
        elif kind is Path:
            check(name, text, bool(text.strip()), "a path", f"An empty one names nothing. Use {name}=out.")


def in_flags(message: str, flags: dict[str, str]) -> str:
    """A message in Python's words (steps=50) in those of a command (--steps 50)."""
    value = r"'([^' ]*)'|('[^']*')|([\w./:+*-]*\w)"
    for name, flag in flags.items():
        message = re.sub(rf"^(?:\w+\.)?{name}(?=:)|`{name}`", flag, message)
        message = re.sub(rf"(?<![\w.]){name}=(?:{value})", rf"{flag} \1\2\3", message)
    if "settings" in flags:
        message = re.sub(r"^\w+Config(\.(?=\w+: )|: )", "--settings: ", message)
    return message.replace("None", str(FULL_PRECISION)) if re.match(r"[\w.: -]*bits[:,]", message) else message


def _remark(message: Warning | str, *_: object, **__: object) -> None:
    if not Bar.quiet:
        typer.echo(f"modiff: {message}", err=True)


def _stop(message: str, code: int, cause: BaseException) -> None:
    typer.echo(f"modiff: {message}", err=True)
    raise typer.Exit(code) from cause


app = typer.Typer(
    name="modiff",
    cls=Commands,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"modiff {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help=VERSION_HELP)] = False,
    quiet: options.Quiet = False,
) -> None:
    """Modulated quantization of diffusion models: quantize the change between denoising steps, not the activation.

    \b
    Example:
        modiff demo
    """


for command in (accelerate, analyze, demo, evaluate, explain, export, generate, quantize, sample, ui):
    app.command(cls=Command)(command)
