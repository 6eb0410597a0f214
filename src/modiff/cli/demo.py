"""`modiff demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modiff.cli.options import MODEL_HELP, Device, Json, NumImages, Seed, Steps, quiet_pipeline, writable
from modiff.files import write_atomically, write_json

Grid = Annotated[
    Path, typer.Option("-o", "--output", metavar="PNG", callback=writable, help="Where the grid of images goes.")
]


def demo(
    model: Annotated[str, typer.Option("--model", help=f"{MODEL_HELP} Unconditional ones only.")] = "embedded",
    steps: Steps = 50,
    num_images: NumImages = 8,
    seed: Seed = 0,
    output: Grid = Path("modiff-demo.png"),
    json_file: Json = None,
    device: Device = "cpu",
) -> None:
    """See it: one model, one noise, quantized plainly and modulated, next to full precision and to fewer steps.

    Prints a table and writes a grid of images, a row for each setting. Up to 4 minutes on two cores.

    \b
    Example:
        modiff demo --steps 50 --num-images 8 --json demo.json
    """
    from modiff.evaluate.demo import run_demo  # imported late: `modiff --help` must not wait for diffusers

    result = run_demo(quiet_pipeline(model, device), steps=steps, num_images=num_images, seed=seed)
    typer.echo(result.table())
    write_atomically(output, lambda file: result.picture().save(file, format="PNG"))
    typer.echo(f"\nimages: {output}")
    if json_file is not None:
        write_json(json_file, result.to_dict())
        typer.echo(f"figures: {json_file}")
