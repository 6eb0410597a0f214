"""`modiff quantize`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from modiff.cli import options
from modiff.config import check, is_bits
from modiff.files import new_folder, read_json
from modiff.presets import FULL_PRECISION

IMAGES = 4  # for the error at the end
METHODS = (
    "accuquant",
    "eda_dm",
    "tfmq_dm",
    "gradient_aligned",
    "modiff",
    "ptq4dm",
    "q_diffusion",
    "ptqd",
    "qncd",
    "tac",
)
"""Those of `modiff.methods`, which takes seconds to import."""
METHOD_HELP = (
    "q_diffusion, ptq4dm, eda_dm, tfmq_dm or gradient_aligned (networks with time embeddings), accuquant (no guidance "
    "in two calls; not with --modulated), ptqd, tac, qncd (all correct the sampler; no guidance in two calls), modiff."
)
SETTINGS_HELP = "A JSON file with fields of the method's settings; those left out stay as published, or quick."
BITS_HELP = "2 to 8; 32 is full precision. The settings' when left out."
MODULATED_HELP = "Code the change between steps instead of whole activations."
QUICK_HELP = "Settings for the embedded model and others of its size: minutes on two cores instead of hours on a GPU."
STEPS_HELP = "Denoising steps, as many as you will sample with. The settings' when left out."
WORK_HELP = "Finished work; run again, it goes on from it. FOLDER.work when left out; delete it when you are done."


def quantize(
    model: options.Model,
    method: Annotated[str, typer.Option("--method", help=METHOD_HELP)],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="New folder of the pipeline.")],
    settings: Annotated[Path | None, typer.Option("--settings", metavar="FILE", help=SETTINGS_HELP)] = None,
    weight_bits: Annotated[int | None, typer.Option("--weight-bits", help=BITS_HELP)] = None,
    activation_bits: Annotated[int | None, typer.Option("--activation-bits", help=BITS_HELP)] = None,
    modulated: Annotated[bool, typer.Option("--modulated", help=MODULATED_HELP)] = False,
    quick: Annotated[bool, typer.Option("--quick", help=QUICK_HELP)] = False,
    scheduler: options.Scheduler = None,
    steps: Annotated[int | None, typer.Option("--steps", help=STEPS_HELP)] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the noise of calibration.")] = None,
    prompt: options.Prompt = None,
    prompts: options.Prompts = None,
    work: Annotated[Path | None, typer.Option("--work", metavar="DIR", help=WORK_HELP)] = None,
    json_file: options.Json = None,
    quiet: options.Quiet = False,
    device: options.Device = "cpu",
) -> None:
    """Calibrate and quantize a model by a published method, and save it. Run again, it goes on where it stopped.

    The folder is a pipeline like any other: modiff.load, DiffusionPipeline.from_pretrained, MODEL of modiff sample. For
    exact anchors (--modulated) it holds a byte more a weight. At the end it is loaded, and four images are compared
    with full precision. Models that take text are calibrated on --prompts, class-conditional ones on all classes.

    \b
    Example:
        modiff quantize embedded --method q_diffusion --quick --weight-bits 4 -o fashion-w4a8
    """
    conditions = options.conditions_of(prompt=prompt, prompts=prompts)
    bits = {"weight_bits": weight_bits, "activation_bits": activation_bits}
    values, typed = _checked(method, settings, bits, {"steps": steps, "seed": seed})
    with new_folder(output) as partial:  # taken now: a folder that cannot be written is known before the work
        from modiff.api import remove
        from modiff.evaluate.pipelines import PipelineSource
        from modiff.generate.environment import environment
        from modiff.generate.job import Conditions
        from modiff.generate.samplers import savable, set_scheduler
        from modiff.generate.worker import check_inputs
        from modiff.hosts.diffusers.runs import classes_in_turn
        from modiff.methods import registry

        chosen = registry.method_config(method, quick=quick, values=values, modulated=modulated or None, changes=typed)
        pipe = options.plain_pipeline(model, device)
        sampling = pipe if scheduler is None else set_scheduler(pipe, scheduler)
        conditions = Conditions(prompts=conditions.prompts, labels=classes_in_turn(pipe, IMAGES))
        source = PipelineSource(sampling, seed=chosen.seed, conditions=conditions)
        check_inputs(sampling, chosen.steps, conditions)
        report = registry.quantize(
            sampling, chosen, folder=work or output.with_name(f"{output.name}.work"), note=conditions.to_dict(),
            run=(lambda i: source.draw(chosen.steps, range(i * chosen.batch, (i + 1) * chosen.batch)))
            if conditions.prompts else None,
        )  # fmt: skip
        options.save(savable(sampling, pipe), partial)
        remove(sampling)
        saved = PipelineSource(options.quiet_pipeline(str(partial), device, scheduler), conditions=conditions)
        text, compared = _compared(source, saved, chosen)
    options.say(f"{report}\n{text}\nsaved: {output}", json_file)
    result = {"model": model, "method": registry.name_of(chosen), "config": chosen.to_dict(), "folder": str(output)}
    options.write_results(json_file, result | report.to_dict() | compared | {"environment": environment()})


def _checked(
    method: str, file: Path | None, bits: dict[str, int | None], counts: dict[str, int | None]
) -> tuple[Any, dict[str, int | None]]:
    """The settings in the file, and those of the command line, where 32 bits are none; checked before torch loads."""
    check("method", method, method in METHODS, f"one of {', '.join(METHODS)}", "Pick one of them.")
    for name, value in bits.items():
        check(name, value, value == FULL_PRECISION or is_bits(value), "32 or 2 to 8", "Use 4 or 8.")
    values = file and read_json(file, "a JSON file with settings of the method", 'Write {"samples": 64}.')
    typed = bits | counts
    return values, {n: None if n in bits and v == FULL_PRECISION else v for n, v in typed.items() if v is not None}


def _compared(source: Any, saved: Any, chosen: Any) -> tuple[str, dict[str, Any]]:
    """Sizes and error, for people and as JSON."""
    from modiff.evaluate.pipelines import TUNING_SEED, image_error, network_bytes
    from modiff.sampling.corrected import with_eta_of

    source.pipe.scheduler = with_eta_of(saved.pipe.scheduler, source.pipe.scheduler)
    images = [s.draw(chosen.steps, range(IMAGES), chosen.seed + TUNING_SEED) for s in (source, saved)]
    sizes, error = [network_bytes(s.pipe) for s in (source, saved)], image_error(images[1], images[0])
    before, after = (f"{size / 2**20:.2f} MiB" for size in sizes)
    value = error["relative_l2"]
    text = f"relative L2 of {IMAGES} images to full precision: {'-' if value is None else f'{value:.4f}'}"
    return f"networks: {before} before, {after} after\n{text}", {"bytes": sizes, "error": error}
