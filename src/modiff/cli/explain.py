"""`modiff explain`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modiff.cli.errors import errors_as_exit_code
from modiff.cli.options import MODEL_HELP, Device, Json, NumImages, Seed, Steps, quiet_pipeline
from modiff.files import check_writable, write_json
from modiff.presets import named_config

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from modiff.config import ModiffConfig
    from modiff.model.report import Report

CONFIG_HELP = "Bits and selection: a preset (w8a8, ...), modulated:8:4, or a JSON file of ModiffConfig.to_json()."
TOLERANCE_HELP = "Largest relative error that coding the input of a layer may make."
PROFILE_HELP = "Keep the times of layers in this file; the same file gives the same choices."


def explain(
    model: Annotated[str, typer.Argument(help=f"{MODEL_HELP} Unconditional ones only.")],
    config: Annotated[str, typer.Option("--config", help=CONFIG_HELP)] = "w8a8",
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
    with errors_as_exit_code():
        chosen = named_config(config)
        if json_file is not None:
            check_writable(json_file)
        from modiff.api import autotune  # imported late: `modiff --help` must not wait for diffusers
        from modiff.kernels.encode import choose_encoder
        from modiff.kernels.isa import machine

        pipe = quiet_pipeline(model, device)
        choices = autotune(
            pipe, chosen, tolerance=tolerance, steps=steps, num_images=num_images, seed=seed, profile=profile
        )
        layers = _on_integers(pipe, chosen, seed)
        typer.echo(f"{machine()}; input side: {choose_encoder(device).reason}\n{choices}\n\non integers:")
        for entry in layers.taken:
            typer.echo(f"  {entry.name}  {entry.execution}: {entry.why}")
        if json_file is not None:
            write_json(json_file, {"machine": machine()} | choices.to_dict() | {"on_integers": layers.to_dict()})


def _on_integers(pipe: DiffusionPipeline, config: ModiffConfig, seed: int) -> Report:
    """How each layer runs on integers and why, after two steps of one image; the pipeline is left as it was."""
    from modiff.api import apply, remove, report
    from modiff.hosts.diffusers.runs import unconditional_run

    apply(pipe, config.on_integers())
    try:
        unconditional_run(pipe, 2, 1, seed)()
        return report(pipe)
    finally:
        remove(pipe)
