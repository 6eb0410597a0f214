"""`modiff analyze`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modiff.cli.options import Config, Device, Json, NumImages, Scheduler, Seed, Steps, Unconditional, quiet_pipeline
from modiff.files import check_writable, write_json
from modiff.presets import named_config


def analyze(
    model: Unconditional,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Folder of the figures.")],
    config: Config = "modulated:32:4",
    scheduler: Scheduler = None,
    steps: Steps = 50,
    num_images: NumImages = 4,
    seed: Seed = 0,
    json_file: Json = None,
    device: Device = "cpu",
) -> None:
    """See why it works: ranges and errors of each layer and step, error growth against its bounds, and a sweep of bits.

    Writes three figures and analysis.json into the folder. The layers are watched with --config; its weights are those
    of the sweep. Up to 3 minutes on two cores for the embedded model.

    \b
    Example:
        modiff analyze embedded --steps 50 --num-images 4 -o analysis
    """
    chosen = named_config(config)
    check_writable(output / "analysis.json")
    from modiff.evaluate.analysis.figures import figures
    from modiff.evaluate.analysis.run import analyze_pipeline  # imported late: `--help` must not wait

    pipe = quiet_pipeline(model, device, scheduler)
    analysis = analyze_pipeline(pipe, chosen, steps=steps, num_images=num_images, seed=seed)
    results = output / "analysis.json" if json_file is None else json_file
    write_json(results, analysis)
    for path in (*figures(analysis, output), results):
        typer.echo(path)
