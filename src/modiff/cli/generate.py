"""`modiff generate`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modiff.cli.errors import errors_as_exit_code
from modiff.cli.options import (
    MODEL_HELP,
    Device,
    Json,
    Label,
    Labels,
    NumImages,
    Prompt,
    Prompts,
    Scheduler,
    Seed,
    Steps,
    conditions_of,
    quiet,
)
from modiff.cli.sample import CONFIG_HELP
from modiff.errors import ConfigError
from modiff.files import check_writable, write_json
from modiff.presets import named_config

if TYPE_CHECKING:
    from modiff.generate.run import Engine, Generated


class EngineName(StrEnum):
    """Where the images are drawn."""

    LOCAL = "local"
    RAY = "ray"


BATCH_HELP = "Images computed at a time; fixed for a folder. 50 when left out."
SHARD_HELP = "Images in a file, a multiple of the batch; fixed for a folder. About 100 when left out."
ENGINE_HELP = "local: this process. ray: a Ray cluster, on this machine if there is no --address (needs modiff[ray])."
ADDRESS_HELP = "The Ray cluster to work on: auto, HOST:PORT or ray://HOST:PORT."
WORKERS_HELP = "Shards that Ray draws at a time; as many as there are processors or GPUs when left out."
THREADS_HELP = "Threads of each worker; when left out, as torch has them, and 1 with Ray."


def generate(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Folder of the shards.")],
    num_images: NumImages,
    config: Annotated[str | None, typer.Option("--config", help=CONFIG_HELP)] = None,
    scheduler: Scheduler = None,
    steps: Steps = 50,
    seed: Seed = 0,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help=BATCH_HELP)] = None,
    shard_size: Annotated[int | None, typer.Option("--shard-size", help=SHARD_HELP)] = None,
    prompt: Prompt = None,
    label: Label = None,
    prompts: Prompts = None,
    labels: Labels = None,
    engine: Annotated[EngineName, typer.Option("--engine", help=ENGINE_HELP)] = EngineName.LOCAL,
    address: Annotated[str | None, typer.Option("--address", help=ADDRESS_HELP)] = None,
    workers: Annotated[int | None, typer.Option("--workers", help=WORKERS_HELP)] = None,
    threads: Annotated[int | None, typer.Option("--threads", help=THREADS_HELP)] = None,
    json_file: Json = None,
    device: Device = "cpu",
) -> None:
    """Generate many images into a folder of shards. Run again after any interruption, it goes on where it stopped.

    Image i is the same bit for bit however often the job was interrupted, and however many images or workers there
    are, on one kind of machine with one batch size; otherwise up to rounding. More images extend a folder.

    \b
    Example:
        modiff generate embedded --config w8a4 --scheduler ddim --steps 50 -n 50000 -o images
    """
    with errors_as_exit_code():
        chosen = None if config is None else named_config(config).to_dict()
        for path in (output / "manifest.json", json_file):
            if path is not None:
                check_writable(path)
        from modiff.generate.job import Job  # imported late: `modiff --help` must not wait
        from modiff.generate.run import run_job

        job = Job(model=model, num_images=num_images, steps=steps, seed=seed, config=chosen, scheduler=scheduler,
                  conditions=conditions_of(prompt=prompt, label=label, prompts=prompts, labels=labels), device=device,
                  batch_size=batch_size, shard_size=shard_size, threads=threads)  # fmt: skip
        where = _engine(engine, address, workers)
        quiet()
        done = run_job(job, output, engine=where, progress=True)
        _tell(done, output)
        if json_file is not None:
            write_json(json_file, _results(done))


def _engine(name: EngineName, address: str | None, workers: int | None) -> Engine:
    from modiff.generate.on_ray import RayEngine
    from modiff.generate.run import LocalEngine

    if name is EngineName.RAY:
        return RayEngine(address=address, workers=workers)
    for option, value in (("--address", address), ("--workers", workers)):
        if value is not None:
            raise ConfigError(
                f"{option}: expected --engine ray with it, got {value!r} without. This process works alone. "
                "Add --engine ray."
            )
    return LocalEngine()


def _tell(done: Generated, output: Path) -> None:
    typer.echo(f"{done.made} made, {done.kept} kept: {output}")
    if done.damaged:
        typer.echo(f"made again, because damaged: {', '.join(done.damaged)}")
    places = len(done.manifest.environments)
    if places > 1:
        typer.echo(f"made in {places} environments (see manifest.json): repeatable up to rounding only")


def _results(done: Generated) -> dict[str, Any]:
    counts = {"made": done.made, "kept": done.kept, "damaged": list(done.damaged), "seconds": done.seconds}
    return counts | {"manifest": done.manifest.to_dict()}
