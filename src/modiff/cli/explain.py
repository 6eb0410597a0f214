"""`modiff explain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modiff.cli.options import Config, Device, Json, NumImages, Seed, Steps, Unconditional, quiet_pipeline
from modiff.files import write_json
from modiff.presets import named_config

TOLERANCE_HELP = "Largest relative error that coding the input of a layer may make."
PROFILE_HELP = "Keep the times of layers in this file; the same file gives the same choices."


def explain(
    model: Unconditional,
    config: Config = "w8a8",
    tolerance: Annotated[float, typer.Option("--tolerance", help=TOLERANCE_HELP)] = 0.01,
    profile: Annotated[Path | None, typer.Option("--profile", metavar="FILE", help=PROFILE_HELP)] = None,
    steps: Steps = 10,
    num_images: NumImages = 4,
    seed: Seed = 0,
    json_file: Json = None,
    device: Device = "cpu",
) -> None:
    """Which layers pay on this machine? Floats, plain or modulated integers for each, the times, and what states cost.

    Times are of one call. Below, the backend that runs each layer on integers, and why it was chosen, or why none can.

    \b
    Example:
        modiff explain embedded --config w8a8 --num-images 8
    """
    chosen = named_config(config)
    from modiff import api  # imported late: `modiff --help` must not wait for diffusers
    from modiff.hosts.diffusers.runs import unconditional_run
    from modiff.kernels.encode import choose_encoder
    from modiff.kernels.isa import machine

    pipe = quiet_pipeline(model, device)
    choices = api.autotune(
        pipe, chosen, tolerance=tolerance, steps=steps, num_images=num_images, seed=seed, profile=profile
    )
    api.apply(pipe, chosen.on_integers())
    unconditional_run(pipe, 2, 1, seed)()  # two steps: the second one is on integers
    layers = api.report(pipe)
    typer.echo(f"{machine()}; input side: {choose_encoder(device).reason}\n{choices}\n\non integers:")
    for entry in layers.taken:
        typer.echo(f"  {entry.name}  {entry.execution}: {entry.why}")
    if json_file is not None:
        write_json(json_file, {"machine": machine()} | choices.to_dict() | {"on_integers": layers.to_dict()})
