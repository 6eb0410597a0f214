"""`modiff analyze`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modiff.cli.errors import errors_as_exit_code
from modiff.cli.options import MODEL_HELP, Device, Json, NumImages, Scheduler, Seed, Steps, quiet_pipeline
from modiff.files import check_writable, write_json
from modiff.presets import named_config

CONFIG_HELP = (
    "What the layers are watched with, and the weights of the sweep: a preset (w8a4, ...), a family with weight and "
    "activation bits (modulated:32:4, tuned:32:3), or a JSON file of ModiffConfig.to_json()."
)
RESULTS = "analysis.json"


def analyze(
    model: Annotated[str, typer.Argument(help=f"{MODEL_HELP} Unconditional ones only.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Folder of the figures.")],
    config: Annotated[str, typer.Option("--config", help=CONFIG_HELP)] = "modulated:32:4",
    scheduler: Scheduler = None,
    steps: Steps = 50,
    num_images: NumImages = 4,
    seed: Seed = 0,
    json_file: Json = None,
    device: Device = "cpu",
) -> None:
    """See why it works: ranges and errors of each layer and step, error growth against its bounds, and a sweep of bits.

    Writes three figures and analysis.json into the folder. Up to 3 minutes on two cores for the embedded model.

    \b
    Example:
        modiff analyze embedded --steps 50 --num-images 4 -o analysis
    """
    with errors_as_exit_code():
        chosen = named_config(config)
        results = output / RESULTS if json_file is None else json_file
        for path in (output / RESULTS, results):
            check_writable(path)
        from modiff.evaluate.analysis.figures import figures
        from modiff.evaluate.analysis.run import analyze_pipeline  # imported late: `--help` must not wait

        pipe = quiet_pipeline(model, device, scheduler)
        analysis = analyze_pipeline(pipe, chosen, steps=steps, num_images=num_images, seed=seed)
        write_json(results, analysis)
        for path in (*figures(analysis, output), results):
            typer.echo(path)
