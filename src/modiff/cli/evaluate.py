"""`modiff evaluate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modiff.cli.errors import errors_as_exit_code
from modiff.cli.options import MODEL_HELP, Device, Json, Seed, quiet_pipeline
from modiff.cli.sample import SCHEDULER_HELP
from modiff.cli.study import STUDY_HELP
from modiff.cli.study import study as run_study
from modiff.io.atomic import check_writable, write_json

if TYPE_CHECKING:
    from modiff.evaluate.suite import Suite
    from modiff.evaluate.suite_images import PipelineSource

CONFIGS_HELP = (
    "Comma-separated, in the place of the preset's: presets (w8a8, w8a4, ...), families with weight and activation "
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
EXTRACTOR_HELP = (
    "'classifier' (Fashion-MNIST, of the package), the folder of another, or an Inception-v3 file: only with it is a "
    "distance called FID."
)
OUTPUT_HELP = "Finished batches; run again, it goes on from them. modiff-evaluation, or modiff-study, when left out."
FOLDER = Path("modiff-evaluation")
LAYER_IMAGES = 4


def evaluate(
    model: Annotated[str, typer.Argument(help=f"{MODEL_HELP} Unconditional ones only.")],
    reference: Annotated[Path | None, typer.Option("--reference", metavar="DIR|FILE", help=REFERENCE_HELP)] = None,
    configs: Annotated[str | None, typer.Option("--configs", help=CONFIGS_HELP)] = None,
    preset: Annotated[str, typer.Option("--preset", help=PRESET_HELP)] = "quick",
    json_file: Json = None,
    report: Annotated[Path | None, typer.Option("--report", metavar="DIR", help=REPORT_HELP)] = None,
    study: Annotated[str | None, typer.Option("--study", metavar="NAMES", help=STUDY_HELP)] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="DIR", help=OUTPUT_HELP)] = None,
    extractor: Annotated[str, typer.Option("--extractor", help=EXTRACTOR_HELP)] = "classifier",
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
        if study is not None:
            beside = {
                "--reference": reference,
                "--configs": configs,
                "--scheduler": scheduler if scheduler != "ddim" else None,
            }
            run_study(model, study, preset=preset, steps=steps, num_images=num_images, seed=seed, device=device,
                      folder=output, json_file=json_file, report=report, beside=beside)  # fmt: skip
            return
        from modiff.evaluate.suite import run_suite  # imported late: `modiff --help` must not wait for diffusers
        from modiff.evaluate.suite_extractor import load_extractor
        from modiff.evaluate.suite_images import PipelineSource
        from modiff.evaluate.suite_plans import plans_of
        from modiff.evaluate.suite_plans import preset as preset_of

        named = [] if configs is None else [part.strip() for part in configs.split(",")]
        chosen = preset_of(preset, num_images=num_images, steps=steps, configs=named)
        plans_of(chosen)  # before the model is loaded: a name may be wrong
        for path in filter(None, (json_file, report and report / "report.html")):
            check_writable(path)
        pipe = quiet_pipeline(model, device)
        judge = load_extractor(extractor, device=device)
        source = PipelineSource(pipe, sampler=scheduler, seed=seed)
        suite = run_suite(source, judge, chosen, output or FOLDER, reference=reference, batch_size=batch_size)
        command = ["modiff", *sys.argv[1:]]
        typer.echo(suite.table())
        if json_file is not None:
            write_json(json_file, suite.to_dict(command))
            typer.echo(f"figures: {json_file}")
        if report is not None:
            typer.echo(f"report: {_report(suite, source, command, model, report)}")


def _report(suite: Suite, source: PipelineSource, command: list[str], model: str, folder: Path) -> Path:
    """Watch the layers of one configuration, and write the report; its page."""
    from modiff.evaluate.report.sections import suite_document
    from modiff.evaluate.report.write import write_report
    from modiff.evaluate.suite_layers import layer_errors, watched_plan

    plan = watched_plan([row.plan for row in suite.rows])
    traces = [] if plan is None else layer_errors(source.pipe, plan, num_images=LAYER_IMAGES, seed=source.seed)
    watched = None if plan is None else (plan, LAYER_IMAGES, traces)
    return write_report(suite_document(suite, command, title=f"Evaluation of {model}", watched=watched), folder)[0]
