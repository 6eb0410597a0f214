"""Where images are made: `modiff sample`, `modiff generate` and `modiff export`."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer

from modiff.cli import options
from modiff.config import check
from modiff.presets import as_config

BATCH_HELP = "Images computed at a time; fixed for a folder. 50 when left out."
SHARD_HELP = "Images in a file, a multiple of the batch; fixed for a folder. About 100 when left out."
ENGINE_HELP = "local: this process. ray: a Ray cluster, on this machine if there is no --address (needs modiff[ray])."
ADDRESS_HELP = "The Ray cluster to work on: auto, HOST:PORT or ray://HOST:PORT."
WORKERS_HELP = "Shards that Ray draws at a time; as many as there are processors or GPUs when left out."
THREADS_HELP = "Threads of each worker; when left out, as torch has them, and 1 with Ray."
RAY = find_spec("ray") is not None  # help offers only what is there
NPZ_HELP = "The npz file to write."
FIRST_HELP = "The first ones; all when left out."
RGB_HELP = "Repeat grey images in three channels, which Inception networks expect."


def sample(
    model: options.Model,
    output: options.Folder,
    config: options.MaybeConfig = None,
    scheduler: options.Scheduler = None,
    steps: options.Steps = 50,
    num_images: options.NumImages = 8,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images at a time; they stay the same.")] = 8,
    seed: options.Seed = 0,
    prompt: options.Prompt = None,
    label: options.Label = None,
    json_file: options.Json = None,
    quiet: options.Quiet = False,
    device: options.Device = "cpu",
) -> None:
    """Generate images into a folder. Run again, it goes on where it stopped.

    \b
    Example:
        modiff sample embedded --config w8a4 --scheduler ddim --steps 50 --num-images 16 -o samples
    """
    chosen = None if config is None else as_config(config)
    from modiff.api import apply
    from modiff.generate.environment import environment
    from modiff.generate.pictures import draw_pictures

    opened = options.quiet_pipeline if chosen is None else options.plain_pipeline
    pipe = opened(model, device, scheduler)
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
    options.say(f"{done.written} written, {len(done.files) - done.written} kept: {output}", json_file)
    result = {"settings": settings | {"steps": steps, "seed": seed, "prompt": prompt, "label": label}}
    result |= {"files": [file.name for file in done.files], "written": done.written, "seconds": done.seconds}
    result |= {"layers": None if report is None else report.to_dict()["layers"], "environment": environment()}
    options.write_results(json_file, result)


def generate(
    model: options.Model,
    output: options.Folder,
    num_images: options.NumImages,
    config: options.MaybeConfig = None,
    scheduler: options.Scheduler = None,
    steps: options.Steps = 50,
    seed: options.Seed = 0,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help=BATCH_HELP)] = None,
    shard_size: Annotated[int | None, typer.Option("--shard-size", help=SHARD_HELP)] = None,
    prompt: options.Prompt = None,
    label: options.Label = None,
    prompts: options.Prompts = None,
    labels: options.Labels = None,
    engine: Annotated[Literal["local", "ray"], typer.Option("--engine", hidden=not RAY, help=ENGINE_HELP)] = "local",
    address: Annotated[str | None, typer.Option("--address", hidden=not RAY, help=ADDRESS_HELP)] = None,
    workers: Annotated[int | None, typer.Option("--workers", hidden=not RAY, help=WORKERS_HELP)] = None,
    threads: Annotated[int | None, typer.Option("--threads", help=THREADS_HELP)] = None,
    json_file: options.Json = None,
    quiet: options.Quiet = False,
    device: options.Device = "cpu",
) -> None:
    """Generate many images into a folder of shards. Run again after any interruption, it goes on where it stopped.

    Image i is the same bit for bit however often the job was interrupted, and however many images or workers there
    are, on one kind of machine with one batch size; otherwise up to rounding. More images extend a folder.

    \b
    Example:
        modiff generate embedded --config w8a4 --scheduler ddim --steps 50 -n 50000 -o images
    """
    for name, value in ("address", address), ("workers", workers):
        check(name, value, engine == "ray" or value is None, "engine=ray with it", "This process works alone.")
    chosen = None if config is None else as_config(config)
    from modiff.generate.job import Job

    conditions = options.conditions_of(prompt=prompt, label=label, prompts=prompts, labels=labels)
    job = Job(model=model, num_images=num_images, steps=steps, seed=seed, config=chosen, scheduler=scheduler,
              conditions=conditions, device=device, batch_size=batch_size, shard_size=shard_size,
              threads=threads)  # fmt: skip
    from modiff.generate.on_ray import RayEngine
    from modiff.generate.run import run_job

    options.quiet()
    where = RayEngine(address=address, workers=workers) if engine == "ray" else None
    done = run_job(job, output, engine=where)
    options.say(f"{done.made} made, {done.kept} kept: {output}", json_file)
    if done.damaged:
        options.say(f"made again, because damaged: {', '.join(done.damaged)}", json_file)
    if (places := len(done.manifest.environments)) > 1:
        options.say(f"made in {places} environments (see manifest.json): repeatable up to rounding only", json_file)
    options.write_results(json_file, vars(done) | {"manifest": done.manifest.to_dict()})


def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of modiff generate.")],
    output: Annotated[Path, typer.Option("-o", "--output", callback=options.npz_path, help=NPZ_HELP)],
    num_images: Annotated[int | None, typer.Option("-n", "--num-images", help=FIRST_HELP)] = None,
    rgb: Annotated[bool, typer.Option("--rgb", help=RGB_HELP)] = False,
    json_file: options.Json = None,
    quiet: options.Quiet = False,
) -> None:
    """Write the images of a folder into one file: arr_0 (N, H, W, C) uint8, as the ADM evaluation suite reads it.

    \b
    Example:
        modiff export images -o images.npz
    """
    from modiff.generate.shards import ARRAY, export_npz

    shape = export_npz(folder, output, num_images=num_images, rgb=rgb)
    options.say(f"{ARRAY} {shape} uint8: {output}", json_file)
    options.write_results(json_file, {"array": ARRAY, "shape": list(shape), "dtype": "uint8", "file": str(output)})
