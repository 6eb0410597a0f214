"""`modiff evaluate --study`: parse, call, show."""

from __future__ import annotations

from pathlib import Path

import typer

from modiff.cli.options import quiet_pipeline
from modiff.errors import ConfigError
from modiff.files import check_writable, write_json

STUDY_HELP = (
    "The paper's experiments on this model in the place of configurations: all, or names such as figure1a,table4; "
    "--preset quick takes 8 images and coarse grids, full 32 and fine ones."
)
STUDY_FOLDER = Path("modiff-study")
STEPS = 50


def study(
    model: str,
    names: str,
    *,
    preset: str,
    steps: int | None,
    num_images: int | None,
    seed: int,
    device: str,
    folder: Path | None,
    json_file: Path | None,
    report: Path | None,
    beside: dict[str, object],
) -> None:
    """Run the experiments that `names` says, or go on with them; print what each found, and write what was asked for.

    Args:
        folder: of what is finished; modiff-study when None.
        beside: options that a study has no use for, and what was given for them (None: nothing).
    """
    given = [option for option, value in beside.items() if value is not None]
    if given:
        raise ConfigError(
            f"--study: expected no {' or '.join(given)} beside it, got {beside[given[0]]}. Every experiment has its "
            "own configurations, samplers and references. Leave it out."
        )
    from modiff.evaluate.report.write import PAGE, write_report  # imported late: `modiff --help` must not wait
    from modiff.evaluate.study.registry import experiment_names
    from modiff.evaluate.study.settings import settings_for
    from modiff.evaluate.study.study import run_study

    settings = settings_for(
        preset,
        num_images=num_images,
        steps=STEPS if steps is None else steps,
        seed=seed,
        experiments=experiment_names(names),  # before the model is loaded: a name may be wrong
        model=model,
    )
    for path in filter(None, (json_file, report and report / PAGE)):
        check_writable(path)
    result = run_study(quiet_pipeline(model, device), settings, folder or STUDY_FOLDER)
    for section in result.sections:
        typer.echo(f"{section.title}\n  {section.summary}\n")
    if json_file is not None:
        write_json(json_file, result.to_dict())
        typer.echo(f"figures: {json_file}")
    if report is not None:
        typer.echo(f"report: {write_report(result.document(f'Trajectory study of {model}'), report)[0]}")
