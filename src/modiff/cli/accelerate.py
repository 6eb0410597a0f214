"""`modiff accelerate`."""

from pathlib import Path
from typing import Annotated

import typer

from modiff.cli import options
from modiff.config import check
from modiff.files import bytes_of, new_folder

ERROR_HELP = "Largest relative L2 to full precision that whole trajectories may have."
MEMORY_HELP = 'What states may take, for example "4GiB"; layers that gain most by each byte keep them.'
COMPILE_HELP = "Compile with torch.compile, both the result and the floats that it is compared with."
OUTPUT_HELP = "New folder of the faster pipeline, in packed integers; none is made where nothing pays."


def accelerate(
    model: options.Model,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help=OUTPUT_HELP)],
    max_error: Annotated[float, typer.Option("--max-error", help=ERROR_HELP)] = 0.02,
    state_memory: Annotated[str | None, typer.Option("--state-memory", metavar="SIZE", help=MEMORY_HELP)] = None,
    compile: Annotated[bool, typer.Option(help=COMPILE_HELP)] = True,
    steps: options.Steps = 50,
    num_images: options.NumImages = 1,
    seed: options.Seed = 0,
    prompt: options.Prompt = None,
    label: options.Label = None,
    json_file: options.Json = None,
    quiet: options.Quiet = False,
    device: options.Device = "cpu",
) -> None:
    """Make a model faster on this machine: time its layers, choose floats or integers and bits for each, and save it.

    The fastest settings whose whole trajectories stay within --max-error run against compiled floats, and are saved
    where they win. Sample with the steps, and as many images at a time, as you will later. Up to 3 minutes on two cores
    for the embedded model. In Python, modiff.accelerate(pipe) leaves the compiled pipeline in your hands.

    \b
    Example:
        modiff accelerate embedded --num-images 4 -o fashion-fast
    """
    check("max_error", max_error, 0 < max_error < 1, "a relative error between 0 and 1", "0.02 is 2 percent.")
    conditions = options.conditions_of(prompt=prompt, label=label)
    budget = None if state_memory is None else bytes_of(state_memory, "state_memory")
    with new_folder(output) as partial:  # taken now: a folder that cannot be written is known before the work
        from modiff import api
        from modiff.generate.environment import environment
        from modiff.generate.worker import check_inputs, draw

        pipe = options.plain_pipeline(model, device)
        check_inputs(pipe, steps, conditions)
        result = api.accelerate(
            pipe, max_error, lambda: draw(pipe, range(num_images), steps=steps, seed=seed, conditions=conditions),
            compile, state_memory=budget,
        )  # fmt: skip
        options.say(result, json_file)
        folder = str(output) if result.report else None
        values = {"model": model, "folder": folder} | result.to_dict() | {"environment": environment()}
        options.write_results(json_file, values)
        if result.report is None:
            raise typer.Exit
        options.save(pipe, partial)
    options.say(f"saved: {output}", json_file)
