"""`modiff export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modiff.cli.errors import errors_as_exit_code
from modiff.cli.options import Json
from modiff.files import check_writable, write_json

COUNT_HELP = "The first so many; all when left out."
RGB_HELP = "Repeat grey images in three channels, which Inception networks expect."


def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of modiff generate.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE.npz", help="The file to write.")],
    num_images: Annotated[int | None, typer.Option("-n", "--num-images", help=COUNT_HELP)] = None,
    rgb: Annotated[bool, typer.Option("--rgb", help=RGB_HELP)] = False,
    json_file: Json = None,
) -> None:
    """Write the images of a folder into one file: arr_0 (N, H, W, C) uint8, as the ADM evaluation suite reads it.

    \b
    Example:
        modiff export images -o images.npz
    """
    with errors_as_exit_code():
        if json_file is not None:
            check_writable(json_file)
        from modiff.generate.export import ARRAY, export_npz  # imported late: `modiff --help` must not wait

        shape = export_npz(folder, output, num_images=num_images, rgb=rgb)
        typer.echo(f"{ARRAY} {shape} uint8: {output}")
        if json_file is not None:
            write_json(json_file, {"array": ARRAY, "shape": list(shape), "dtype": "uint8", "file": str(output)})
