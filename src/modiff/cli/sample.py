"""`modiff sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modiff.cli import options
from modiff.files import check_writable, write_json
from modiff.presets import named_config


def sample(
    model: options.Model,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Folder of the images.")],
    config: options.MaybeConfig = None,
    scheduler: options.Scheduler = None,
    steps: options.Steps = 50,
    num_images: options.NumImages = 8,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images at a time; they stay the same.")] = 8,
    seed: options.Seed = 0,
    prompt: options.Prompt = None,
    label: options.Label = None,
    json_file: options.Json = None,
    device: options.Device = "cpu",
) -> None:
    """Generate images into a folder. Run again, it goes on where it stopped.

    \b
    Example:
        modiff sample embedded --config w8a4 --scheduler ddim --steps 50 --num-images 16 -o samples
    """
    chosen = None if config is None else named_config(config)
    check_writable(output / "settings.json")
    from modiff.api import apply  # imported late: `modiff --help` must not wait
    from modiff.generate.environment import environment
    from modiff.generate.pictures import draw_pictures

    pipe = options.quiet_pipeline(model, device, scheduler)
    report = None if chosen is None else apply(pipe, chosen)
    settings = {
        "model": model,
        "config": None if chosen is None else chosen.to_dict(),
        "scheduler": type(pipe.scheduler).__name__ if scheduler is None else scheduler,
    }
    done = draw_pictures(
        pipe, output, num_images=num_images, steps=steps, seed=seed, settings=settings, batch_size=batch_size,
        conditions=options.conditions_of(prompt=prompt, label=label),
    )  # fmt: skip
    typer.echo(f"{done.written} written, {len(done.files) - done.written} kept: {output}")
    if json_file is not None:
        result = {"settings": settings | {"steps": steps, "seed": seed, "prompt": prompt, "label": label}}
        result |= {"files": [file.name for file in done.files], "written": done.written, "seconds": done.seconds}
        result |= {"layers": None if report is None else report.to_dict()["layers"], "environment": environment()}
        write_json(json_file, result)
