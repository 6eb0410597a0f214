"""`modiff sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modiff.cli.errors import errors_as_exit_code
from modiff.cli.options import (
    MODEL_HELP,
    Device,
    Json,
    Label,
    NumImages,
    Prompt,
    Scheduler,
    Seed,
    Steps,
    conditions_of,
    quiet_pipeline,
)
from modiff.files import check_writable, write_json
from modiff.presets import named_config

CONFIG_HELP = (
    "A preset (w8a8, w8a4, ...), a family with weight and activation bits (modulated:8:4, plain:8:4, tuned:32:4), "
    "or a JSON file of ModiffConfig.to_json(). Full precision when left out."
)


def sample(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Folder of the images.")],
    config: Annotated[str | None, typer.Option("--config", help=CONFIG_HELP)] = None,
    scheduler: Scheduler = None,
    steps: Steps = 50,
    num_images: NumImages = 8,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images at a time; they stay the same.")] = 8,
    seed: Seed = 0,
    prompt: Prompt = None,
    label: Label = None,
    json_file: Json = None,
    device: Device = "cpu",
) -> None:
    """Generate images into a folder. Run again, it goes on where it stopped.

    \b
    Example:
        modiff sample embedded --config w8a4 --scheduler ddim --steps 50 --num-images 16 -o samples
    """
    with errors_as_exit_code():
        chosen = None if config is None else named_config(config)
        if json_file is not None:
            check_writable(json_file)
        check_writable(output / "settings.json")
        from modiff.api import apply
        from modiff.generate.environment import environment
        from modiff.generate.job import check_counts
        from modiff.generate.pictures import draw_pictures  # imported late: `modiff --help` must not wait

        check_counts({"--num-images": num_images, "--steps": steps, "--batch-size": batch_size}, seed)
        pipe = quiet_pipeline(model, device, scheduler)
        report = None if chosen is None else apply(pipe, chosen)
        settings = {
            "model": model,
            "config": None if chosen is None else chosen.to_dict(),
            "scheduler": type(pipe.scheduler).__name__ if scheduler is None else scheduler,
        }
        done = draw_pictures(
            pipe, output, num_images=num_images, steps=steps, seed=seed, settings=settings, batch_size=batch_size,
            conditions=conditions_of(prompt=prompt, label=label),
        )  # fmt: skip
        typer.echo(f"{done.written} written, {len(done.files) - done.written} kept: {output}")
        if json_file is not None:
            result = {"settings": settings | {"steps": steps, "seed": seed, "prompt": prompt, "label": label}}
            result |= {"files": [file.name for file in done.files], "written": done.written, "seconds": done.seconds}
            result |= {"layers": None if report is None else report.to_dict()["layers"], "environment": environment()}
            write_json(json_file, result)
