"""`modiff evaluate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modiff.cli.errors import errors_as_exit_code
from modiff.cli.options import (
    MODEL_HELP,
    SCHEDULER_HELP,
    Device,
    Json,
    Labels,
    Prompts,
    Seed,
    conditions_of,
    quiet_pipeline,
)
from modiff.files import check_writable, write_json

if TYPE_CHECKING:
    from modiff.evaluate.suite.images import PipelineSource
    from modiff.evaluate.suite.plans import Preset
    from modiff.evaluate.suite.run import Suite

CONFIGS_HELP = (
    "Comma-separated, instead of the preset's: presets (w8a8, w8a4, ...), families with weight and activation "
    "bits (modulated:8:4, plain:8:4, tuned:8:3), JSON files of ModiffConfig.to_json(). Full precision and half the "
    "steps are always run."
)
REFERENCE_HELP = (
    "Real images of the model's size: .npz (arr_0, or its first array), .npy, or a folder of these, of pictures or of "
    "`modiff generate`."
)
PRESET_HELP = (
    "quick: 500 images, 4 configurations, about 16 minutes on two cores for the embedded model; full: 10,000 images, "
    "19 configurations, more than a day."
)
REPORT_HELP = "Write report.html, which needs no other file, and report.md here."
METRICS_HELP = "Also lpips, to full precision, and clip, to the prompts; they need modiff[eval]. Between commas."
CLIP_HELP = "A local folder of a CLIP model, for --metrics clip."
EXTRACTOR_HELP = (
    "'classifier' (Fashion-MNIST, of the package), 'cifar10-classifier' (where the package has it), the folder of "
    "another, or an Inception-v3 file: only with it is a distance called FID."
)
OUTPUT_HELP = "Finished batches; run again, it goes on from them."
FOLDER = Path("modiff-evaluation")


def evaluate(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    reference: Annotated[Path | None, typer.Option("--reference", metavar="DIR|FILE", help=REFERENCE_HELP)] = None,
    configs: Annotated[str | None, typer.Option("--configs", help=CONFIGS_HELP)] = None,
    preset: Annotated[str, typer.Option("--preset", help=PRESET_HELP)] = "quick",
    json_file: Json = None,
    report: Annotated[Path | None, typer.Option("--report", metavar="DIR", help=REPORT_HELP)] = None,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help=OUTPUT_HELP)] = FOLDER,
    extractor: Annotated[str, typer.Option("--extractor", help=EXTRACTOR_HELP)] = "classifier",
    metrics: Annotated[str | None, typer.Option("--metrics", metavar="NAMES", help=METRICS_HELP)] = None,
    clip: Annotated[Path | None, typer.Option("--clip", metavar="DIR", help=CLIP_HELP)] = None,
    prompts: Prompts = None,
    labels: Labels = None,
    scheduler: Annotated[str, typer.Option("--scheduler", help=SCHEDULER_HELP)] = "ddim",
    steps: Annotated[int | None, typer.Option("--steps", help="Denoising steps; the preset's when left out.")] = None,
    num_images: Annotated[
        int | None, typer.Option("-n", "--num-images", help="Images of each configuration; the preset's when left out.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images at a time.")] = 50,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Is it any good? Every configuration against full precision, fewer steps and real images, with intervals.

    Stopped at any time, the same command goes on where it was.

    \b
    Example:
        modiff evaluate embedded --preset quick --json evaluation.json --report report
    """
    with errors_as_exit_code():
        from modiff.evaluate.features.load import load_extractor  # imported late: `--help` must not wait for diffusers
        from modiff.evaluate.suite.extras import load_extras
        from modiff.evaluate.suite.images import PipelineSource
        from modiff.evaluate.suite.run import run_suite

        chosen = _chosen(preset, num_images, steps, configs)
        for path in filter(None, (json_file, report and report / "report.html")):
            check_writable(path)
        conditions = conditions_of(prompts=prompts, labels=labels)
        extras = load_extras(metrics, clip=clip, conditions=conditions, device=device)
        pipe = quiet_pipeline(model, device)
        judge = load_extractor(extractor, device=device)
        source = PipelineSource(pipe, sampler=scheduler, seed=seed, conditions=conditions)
        suite = run_suite(source, judge, chosen, output, reference=reference, extras=extras,
                          batch_size=batch_size)  # fmt: skip
        _show(suite, source, model, json_file, report)


def _chosen(name: str, num_images: int | None, steps: int | None, configs: str | None) -> Preset:
    """The preset with the options that replace its own. Raises: ConfigError for an unknown name."""
    from modiff.evaluate.suite.plans import plans_of, preset

    named = [] if configs is None else [part.strip() for part in configs.split(",")]
    chosen = preset(name, num_images=num_images, steps=steps, configs=named)
    plans_of(chosen)  # before the model is loaded: a name may be wrong
    return chosen


def _show(suite: Suite, source: PipelineSource, model: str, json_file: Path | None, report: Path | None) -> None:
    """Print the table, and write the files that the options name."""
    command = ["modiff", *sys.argv[1:]]
    typer.echo(suite.table())
    if json_file is not None:
        write_json(json_file, suite.to_dict(command))
        typer.echo(f"figures: {json_file}")
    if report is not None:
        typer.echo(f"report: {_report(suite, source, command, model, report)}")


def _report(suite: Suite, source: PipelineSource, command: list[str], model: str, folder: Path) -> Path:
    """Watch the layers of one configuration, and write the report; its page."""
    from modiff.evaluate.report.page import write_report
    from modiff.evaluate.report.sections import suite_document
    from modiff.evaluate.suite.run import watched_layers

    watched = watched_layers(source, [row.plan for row in suite.rows])
    return write_report(suite_document(suite, command, title=f"Evaluation of {model}", watched=watched), folder)[0]
