"""What tells of a model and leaves it alone: `modiff demo`, `modiff analyze` and `modiff explain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modiff.cli import options
from modiff.files import check_writable, write_atomically, write_json
from modiff.presets import as_config

TOLERANCE_HELP = "Largest relative error that coding the input of a layer may make."
PROFILE_HELP = "Keep the times of layers in this file; the same file gives the same choices."
GRID_HELP = "Where the grid of images goes."


def demo(
    model: Annotated[str, typer.Option("--model", help=f"{options.MODEL_HELP} Unconditional ones only.")] = "embedded",
    steps: options.Steps = 50,
    num_images: options.NumImages = 8,
    seed: options.Seed = 0,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="PNG", callback=options.writable, help=GRID_HELP)
    ] = Path("modiff-demo.png"),
    json_file: options.Json = None,
    device: options.Device = "cpu",
) -> None:
    """See it: one model, one noise, quantized plainly and modulated, next to full precision and to fewer steps.

    Prints a table and writes a grid of images, a row for each setting. Up to 4 minutes on two cores.

    \b
    Example:
        modiff demo --steps 50 --num-images 8 --json demo.json
    """
    from modiff.evaluate.demo import run_demo  # imported late: `modiff --help` must not wait for diffusers

    result = run_demo(options.quiet_pipeline(model, device), steps=steps, num_images=num_images, seed=seed)
    typer.echo(result.table())
    write_atomically(output, lambda file: result.picture().save(file, format="PNG"))
    typer.echo(f"\nimages: {output}")
    if json_file is not None:
        write_json(json_file, result.to_dict())
        typer.echo(f"figures: {json_file}")


def analyze(
    model: options.Unconditional,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Folder of the figures.")],
    config: options.Config = "modulated:32:4",
    scheduler: options.Scheduler = None,
    steps: options.Steps = 50,
    num_images: options.NumImages = 4,
    seed: options.Seed = 0,
    json_file: options.Json = None,
    device: options.Device = "cpu",
) -> None:
    """See why it works: ranges and errors of each layer and step, error growth against its bounds, and a sweep of bits.

    Writes three figures and analysis.json into the folder. The layers are watched with --config; its weights are those
    of the sweep. Up to 3 minutes on two cores for the embedded model.

    \b
    Example:
        modiff analyze embedded --steps 50 --num-images 4 -o analysis
    """
    chosen = as_config(config)
    check_writable(output / "analysis.json")
    from modiff.evaluate.analysis.figures import figures
    from modiff.evaluate.analysis.run import analyze_pipeline  # imported late: `--help` must not wait

    pipe = options.quiet_pipeline(model, device, scheduler)
    analysis = analyze_pipeline(pipe, chosen, steps=steps, num_images=num_images, seed=seed)
    results = output / "analysis.json" if json_file is None else json_file
    write_json(results, analysis)
    for path in (*figures(analysis, output), results):
        typer.echo(path)
    for outlier in analysis["outliers"]:
        typer.echo(outlier["advice"], err=True)


def explain(
    model: options.Unconditional,
    config: options.Config = "w8a8",
    tolerance: Annotated[float, typer.Option("--tolerance", help=TOLERANCE_HELP)] = 0.01,
    profile: Annotated[Path | None, typer.Option("--profile", metavar="FILE", help=PROFILE_HELP)] = None,
    steps: options.Steps = 10,
    num_images: options.NumImages = 4,
    seed: options.Seed = 0,
    json_file: options.Json = None,
    device: options.Device = "cpu",
) -> None:
    """Which layers pay on this machine? Floats, plain or modulated integers for each, the times, and what states cost.

    Times are of one call. Below, the backend that runs each layer on integers, and why it was chosen, or why none can.

    \b
    Example:
        modiff explain embedded --config w8a8 --num-images 8
    """
    chosen = as_config(config)
    from modiff import api  # imported late: `modiff --help` must not wait for diffusers
    from modiff.hosts.diffusers.runs import calibration_run
    from modiff.kernels.encode import choose_encoder
    from modiff.kernels.isa import machine

    pipe = options.quiet_pipeline(model, device)
    choices = api.autotune(
        pipe, chosen, tolerance=tolerance, steps=steps, num_images=num_images, seed=seed, profile=profile
    )
    api.apply(pipe, chosen.on_integers())
    calibration_run(pipe, steps=2, batch=1, seed=seed)(0)  # two steps: the second one is on integers
    layers = api.report(pipe)
    typer.echo(f"{machine()}; input side: {choose_encoder(device).reason}\n{choices}\n\non integers:")
    for entry in layers.taken:
        typer.echo(f"  {entry.name}  {entry.execution}: {entry.why}")
    if json_file is not None:
        write_json(json_file, {"machine": machine()} | choices.to_dict() | {"on_integers": layers.to_dict()})
