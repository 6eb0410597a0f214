"""`modiff evaluate`."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from modiff.cli import options

CONFIGS_HELP = (
    f"Comma-separated, instead of the preset's. {options.CONFIG_HELP} Full precision and half the steps always run."
)
REFERENCE_HELP = (
    "Real images of the model's size: .npz (arr_0, or its first array), .npy, or a folder of pictures or of "
    "`modiff generate`."
)
PRESET_HELP = (
    "quick: 500 images, 4 configurations, about 16 minutes on two cores for the embedded model; full: 10,000 images, "
    "19 configurations, more than a day."
)
REPORT_HELP = "Write report.html, which needs no other file, and report.md here."
EXTRAS = [text for package, text in (("lpips", "lpips, to full precision"), ("transformers", "clip, to the prompts"))
          if find_spec(package)]  # fmt: skip
METRICS_HELP = f"Also {', and '.join(EXTRAS)}; both between commas."
SCHEDULER_HELP = options.SCHEDULER_HELP.replace("the model's own", "ddim, or the model's own for flow matching,")
EXTRACTOR_HELP = (
    "'classifier' (Fashion-MNIST, of the package), 'cifar10-classifier' (where the package has it), the folder of "
    "another, an Inception-v3 file (its distance alone is called FID), or 'none', the default for colour images."
)
CLIP_HELP = "A local folder of a CLIP model, for --metrics clip."


def evaluate(
    model: options.Model,
    reference: Annotated[Path | None, typer.Option("--reference", metavar="DIR|FILE", help=REFERENCE_HELP)] = None,
    configs: Annotated[str | None, typer.Option("--configs", help=CONFIGS_HELP)] = None,
    preset: Annotated[str, typer.Option("--preset", help=PRESET_HELP)] = "quick",
    json_file: options.Json = None,
    quiet: options.Quiet = False,
    report: Annotated[Path | None, typer.Option("--report", callback=options.folder_path, help=REPORT_HELP)] = None,
    output: options.Folder = Path("modiff-evaluation"),
    extractor: Annotated[str | None, typer.Option("--extractor", help=EXTRACTOR_HELP)] = None,
    metrics: Annotated[str | None, typer.Option("--metrics", hidden=not EXTRAS, help=METRICS_HELP)] = None,
    clip: Annotated[Path | None, typer.Option("--clip", hidden=not find_spec("transformers"), help=CLIP_HELP)] = None,
    prompt: options.Prompt = None,
    label: options.Label = None,
    prompts: options.Prompts = None,
    labels: options.Labels = None,
    scheduler: Annotated[str | None, typer.Option("--scheduler", callback=options.known, help=SCHEDULER_HELP)] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="The preset's when left out.")] = None,
    num_images: Annotated[int | None, typer.Option("-n", "--num-images", help="The preset's when left out.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images at a time.")] = 50,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
) -> None:
    """Is it any good? Every configuration against full precision, fewer steps and real images, with intervals.

    Stopped at any time, the same command goes on where it was.

    \b
    Example:
        modiff evaluate embedded --preset quick --json evaluation.json --report report
    """
    from modiff.evaluate.suite import plans

    named = [] if configs is None else [name.strip() for name in configs.split(",")]
    chosen = plans.preset(preset, num_images=num_images, steps=steps, configs=named)
    plans.plans_of(chosen)  # before the model is loaded: a name may be wrong
    conditions = options.conditions_of(prompt=prompt, label=label, prompts=prompts, labels=labels)
    from modiff.evaluate.features.load import load_extractor
    from modiff.evaluate.pipelines import PipelineSource
    from modiff.evaluate.report.page import write_report
    from modiff.evaluate.report.sections import suite_document
    from modiff.evaluate.suite.extras import load_extras
    from modiff.evaluate.suite.run import run_suite, watched_layers
    from modiff.generate.samplers import usual_sampler

    extras = load_extras(metrics, clip=clip, conditions=conditions, device=device)
    pipe = options.plain_pipeline(model, device)
    source = PipelineSource(pipe, sampler=scheduler or usual_sampler(pipe), seed=seed, conditions=conditions)
    judge = load_extractor(extractor, channels=source.shape[-1], device=device)
    suite = run_suite(source, judge, chosen, output, reference=reference, extras=extras, batch_size=batch_size)
    command = ["modiff", *sys.argv[1:]]
    options.say(suite.table(), json_file)
    options.write_results(json_file, suite.to_dict(command))
    if report is not None:
        watched = watched_layers(source, [row.plan for row in suite.rows])
        document = suite_document(suite, command, title=f"Evaluation of {model}", watched=watched)
        options.say(f"report: {write_report(document, report)[0]}", json_file)
