"""What tells of a model and leaves it alone: `modiff demo`, `modiff analyze` and `modiff explain`."""

from pathlib import Path
from typing import Annotated

import typer

from modiff.cli import options
from modiff.config import check
from modiff.files import write_atomically
from modiff.presets import as_config

TOLERANCE_HELP = "Largest relative error that coding the input of a layer may make."
QUICK_HELP = "Six of the rows, none of them tuned: a minute at most."
PROFILE_HELP = "Keep the times of layers in this file; the same file gives the same choices."


def demo(
    model: Annotated[str, typer.Option("--model", callback=options.known, help=options.MODEL_HELP)] = "embedded",
    steps: options.Steps = 50,
    num_images: options.NumImages = 8,
    seed: options.Seed = 0,
    quick: Annotated[bool, typer.Option("--quick", help=QUICK_HELP)] = False,
    prompt: options.Prompt = None,
    label: options.Label = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="PNG", callback=options.png_path, help="The images.")
    ] = Path("modiff-demo.png"),
    json_file: options.Json = None,
    quiet: options.Quiet = False,
    device: options.Device = "cpu",
) -> None:
    """See it: one model, one noise, quantized plainly and modulated, next to full precision and to fewer steps.

    Prints a table and writes a picture: full precision, half the steps, plain and modulated 4 bits, their errors, and
    where they differ. Up to 4 minutes on two cores.

    \b
    Example:
        modiff demo --steps 50 --num-images 8 --json demo.json
    """
    conditions = options.conditions_of(prompt=prompt, label=label)
    from modiff.evaluate import demo as logic  # imported late, as in all commands: `modiff --help` must not wait

    pipe, done = options.plain_pipeline(model, device), []
    try:
        rows = [plan for plan in logic.plans(steps) if not quick or plan.name in logic.QUICK]
        common = {"seed": seed, "conditions": conditions, "rows": rows}
        logic.run_demo(pipe, steps=steps, num_images=num_images, after_row=done.append, **common)
    finally:  # also the rows before an interrupt
        if done:
            options.say(done[-1].table(), json_file)
            write_atomically(output, lambda file: done[-1].picture().save(file, format="PNG"))
            options.say(f"\nimages: {output}", json_file)
            options.write_results(json_file, done[-1].to_dict())


def analyze(
    model: options.Model,
    output: options.Folder,
    config: options.Config = "modulated:32:4",
    scheduler: options.Scheduler = None,
    steps: options.Steps = 50,
    num_images: options.NumImages = 4,
    seed: options.Seed = 0,
    prompt: options.Prompt = None,
    label: options.Label = None,
    json_file: options.Json = None,
    quiet: options.Quiet = False,
    device: options.Device = "cpu",
) -> None:
    """See why it works: ranges and errors of each layer and step, error growth against its bounds, and a sweep of bits.

    Writes three figures and analysis.json into the folder, and ends with what they say: which bits are safe, whether
    modulation helps, which layers stand out, what to type next. The layers are watched with --config; its weights are
    those of the sweep. Up to 3 minutes on two cores for the embedded model.

    \b
    Example:
        modiff analyze embedded --steps 50 --num-images 4 -o analysis
    """
    chosen, conditions = as_config(config), options.conditions_of(prompt=prompt, label=label)
    from modiff.evaluate.analysis.figures import figures
    from modiff.evaluate.analysis.findings import findings
    from modiff.evaluate.analysis.run import analyze_pipeline

    pipe = options.plain_pipeline(model, device, scheduler)
    analysis = analyze_pipeline(pipe, chosen, steps=steps, num_images=num_images, seed=seed, conditions=conditions)
    results = output / "analysis.json" if json_file is None else json_file
    options.write_results(results, analysis)
    for text in (*figures(analysis, output), results, f"\n{findings(analysis, model, scheduler)}"):
        options.say(text, json_file)


def explain(
    model: options.Model,
    config: options.Config = "w8a8",
    tolerance: Annotated[float, typer.Option("--tolerance", help=TOLERANCE_HELP)] = 0.01,
    profile: Annotated[Path | None, typer.Option("--profile", callback=options.json_path, help=PROFILE_HELP)] = None,
    steps: options.Steps = 10,
    num_images: options.NumImages = 4,
    seed: options.Seed = 0,
    prompt: options.Prompt = None,
    label: options.Label = None,
    json_file: options.Json = None,
    quiet: options.Quiet = False,
    device: options.Device = "cpu",
) -> None:
    """Which layers pay on this machine? Floats, plain or modulated integers for each, the times, and what states cost.

    Times are of one call. Below, the backend that runs each layer on integers, and why it was chosen, or why none can.

    \b
    Example:
        modiff explain embedded --config w8a8 --num-images 8
    """
    check("tolerance", tolerance, tolerance > 0, "a relative error above 0", "0.01 is one percent of the input.")
    chosen, conditions = as_config(config), options.conditions_of(prompt=prompt, label=label)
    from modiff import api
    from modiff.generate.worker import check_inputs, draw
    from modiff.kernels.encode import choose_encoder
    from modiff.kernels.isa import machine

    pipe = options.plain_pipeline(model, device)
    check_inputs(pipe, steps, conditions)

    def run(steps: int = steps, count: int = num_images) -> object:
        return draw(pipe, range(count), steps=steps, seed=seed, conditions=conditions)

    choices = api.autotune(pipe, chosen, tolerance=tolerance, run=run, profile=profile)
    api.apply(pipe, chosen.on_integers())
    run(2, 1)  # two steps: the second one is on integers
    layers = api.report(pipe)
    head = f"{machine()}; input side: {choose_encoder(device).reason}"
    options.say(f"{head}\n{choices}\n\non integers: {layers}\n{layers.table()}", json_file)
    options.write_results(json_file, {"machine": machine()} | choices.to_dict() | {"on_integers": layers.to_dict()})
