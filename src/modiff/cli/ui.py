"""`modiff ui`."""

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from modiff.cli import options
from modiff.config import check
from modiff.errors import ConfigError

ROOT_HELP = "The folder whose models can be chosen; nothing outside of it is read, links followed."
PORT_HELP = "0 is any that is free."
HOST_HELP = "The address to listen on. Others than 127.0.0.1 let everybody in who reaches this machine."


def ui(
    root: Annotated[Path, typer.Option("--root", metavar="FOLDER", help=ROOT_HELP)] = Path(),
    port: Annotated[int, typer.Option("--port", help=PORT_HELP)] = 7860,
    host: Annotated[str, typer.Option("--host", help=HOST_HELP)] = "127.0.0.1",
    device: options.Device = "cpu",
) -> None:
    """Compare in a browser: full precision and quantized side by side as they denoise (needs modiff[web]).

    Pick a model and a configuration, watch both, see error, time and layers, and download a report. It serves this
    machine alone, asks the network for nothing, and runs until Ctrl-C.

    \b
    Example:
        modiff ui --root models
    """
    if find_spec("gradio") is None:
        raise ConfigError("ui: expected Gradio, got an installation without it. It draws the page. "
                          "Type pip install 'modiff[web]'.")  # fmt: skip
    check("port", port, 0 <= port < 2**16, "0 to 65535", "0 is any that is free. Use port=7860.")
    from modiff.web.serve import serve

    options.quiet()
    serve(root, partial(options.plain_pipeline, device=device), host=host, port=port,
          ready=lambda url: typer.echo(f"modiff ui: {url} (Ctrl-C ends it)"))  # fmt: skip
