"""`modiff quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modiff.cli.options import MODEL_HELP, Device, Json, Scheduler, quiet_pipeline
from modiff.files import new_folder, read_json, write_json
from modiff.presets import FULL_PRECISION

METHOD_HELP = "q_diffusion, ptq4dm, tfmq_dm, accuquant or modiff."
CONFIG_HELP = "A JSON file with fields of the method's settings; those left out stay as published, or quick."
BITS_HELP = "2 to 8; 32 is full precision. The settings' when left out."
MODULATED_HELP = "Code the change between steps instead of whole activations."
QUICK_HELP = "Settings for the embedded model and others of its size: minutes on two cores instead of hours on a GPU."
STEPS_HELP = "Denoising steps, as many as you will sample with. The settings' when left out."
WORK_HELP = "Finished work; run again, it goes on from it. FOLDER.work when left out; delete it when you are done."
OUTPUT_HELP = "New folder of the quantized pipeline."


def quantize(
    model: Annotated[str, typer.Argument(help=f"{MODEL_HELP} Without a prompt only.")],
    method: Annotated[str, typer.Option("--method", help=METHOD_HELP)],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help=OUTPUT_HELP)],
    config: Annotated[Path | None, typer.Option("--config", metavar="FILE", help=CONFIG_HELP)] = None,
    weight_bits: Annotated[int | None, typer.Option("--weight-bits", help=BITS_HELP)] = None,
    activation_bits: Annotated[int | None, typer.Option("--activation-bits", help=BITS_HELP)] = None,
    modulated: Annotated[bool, typer.Option("--modulated", help=MODULATED_HELP)] = False,
    quick: Annotated[bool, typer.Option("--quick", help=QUICK_HELP)] = False,
    scheduler: Scheduler = None,
    steps: Annotated[int | None, typer.Option("--steps", help=STEPS_HELP)] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the noise of calibration.")] = None,
    work: Annotated[Path | None, typer.Option("--work", metavar="DIR", help=WORK_HELP)] = None,
    json_file: Json = None,
    device: Device = "cpu",
) -> None:
    """Calibrate and quantize a model by a published method, and save it. Run again, it goes on where it stopped.

    The folder is a pipeline like any other: modiff.load(FOLDER), DiffusionPipeline.from_pretrained(FOLDER), or the
    MODEL of modiff sample.

    \b
    Example:
        modiff quantize embedded --method q_diffusion --quick --weight-bits 4 -o fashion-w4a8
    """
    with new_folder(output) as partial:  # taken now: a folder that cannot be written is known before the work
        from modiff.api import save  # imported late: `modiff --help` must not wait for diffusers
        from modiff.generate.environment import environment
        from modiff.generate.samplers import UnconditionalPipeline, set_scheduler
        from modiff.methods import registry

        bits = {"weight_bits": weight_bits, "activation_bits": activation_bits}
        changes = {name: None if b == FULL_PRECISION else b for name, b in bits.items() if b is not None}
        changes |= {name: value for name, value in (("steps", steps), ("seed", seed)) if value is not None}
        advice = "Write one with the config's to_json()."
        values = None if config is None else read_json(config, "a JSON file with settings of the method", advice)
        chosen = registry.method_config(
            method, quick=quick, values=values, modulated=modulated or None, changes=changes
        )
        pipe = quiet_pipeline(model, device)
        sampling = pipe if scheduler is None else set_scheduler(pipe, scheduler)
        report = registry.quantize(sampling, chosen, folder=work or output.with_name(f"{output.name}.work"))
        # diffusers has no class for the pipeline of any scheduler: then the model's own with the same network
        save(pipe if isinstance(sampling, UnconditionalPipeline) else sampling, partial)
    typer.echo(f"{report}\nsaved: {output}")
    if json_file is not None:
        settings = {"model": model, "method": registry.name_of(chosen), "config": chosen.to_dict()}
        write_json(json_file, settings | {"folder": str(output)} | report.to_dict() | {"environment": environment()})
