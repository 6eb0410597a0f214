"""Run the trajectory study, or go on with one that was stopped."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from experiments.experiment import Experiment, StudySection, Values
from experiments.lab import Lab
from experiments.registry import EXPERIMENTS, experiment_names
from experiments.settings import IMAGES, StudySettings
from experiments.store import Store
from modiff.errors import ConfigError
from modiff.evaluate.report.document import Cell, Column, Document, Section, Table
from modiff.generate.digest import digest
from modiff.generate.digest import settings as settings_of
from modiff.generate.environment import Environment, environment
from modiff.hosts.diffusers.runs import unconditional_run

LEAD = (
    "Every experiment of the MoDiff paper that asks something of one trajectory, on a model of one's own: what was "
    "printed, what was found, and why they differ. Errors are those of the images to full precision from the same "
    "seeds, unless said otherwise; lower is better. Bit-operations are not speed."
)


@dataclass(frozen=True)
class StudyResult:
    """What was found. values: of each experiment by name, as plain JSON. sections: ready to be shown."""

    sections: tuple[StudySection, ...]
    values: dict[str, Values]
    settings: dict[str, Any]
    environment: Environment

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, figures left out."""
        return {"settings": self.settings, "environment": dict(self.environment), "experiments": self.values}

    def report_sections(self) -> list[Section]:
        """The experiments as sections of a report, for `suite_document(more=...)`."""
        return [section.section() for section in self.sections]

    def document(self, title: str = "Trajectory study") -> Document:
        """A report of its own."""
        return Document(title, LEAD, (*self.report_sections(), _origin(self)))


def run_study(pipe: DiffusionPipeline, settings: StudySettings, folder: Path, *, progress: bool = True) -> StudyResult:
    """Do every experiment that the settings name, but those that `folder` has the results of.

    Args:
        pipe: unconditional, without modiff; it is unchanged afterwards.
        folder: kept, one JSON file for each experiment and each run, written whole: the same call goes on after a kill.
        progress: a bar on stderr for each experiment.
    Raises: ConfigError for a pipeline that needs a prompt, a folder of another model or other settings, or a name that
        is no experiment; FormatError for a damaged file; OSError that names a file. What was finished is kept.
    Cost: see docs/study.md; all of them at "quick" are about 250 trajectories of a batch.
    """
    names = experiment_names(",".join(settings.experiments))
    _check(pipe)
    present = environment()
    shaping = {key: value for key, value in settings.to_dict().items() if key not in ("experiments", "model")}
    shaping |= {
        "pipeline": type(pipe).__name__,
        "model": digest(pipe),
        "schedule": settings_of(pipe.scheduler),
        "modiff": present["modiff"],
        "torch": present["torch"],
    }
    store = Store(folder, shaping)
    lab: Lab | None = None
    values: dict[str, Values] = {}
    for i, name in enumerate(names):
        kept = store.experiment(name)
        if kept is None:
            lab = lab or Lab(pipe, settings, store, progress=progress)
            lab.doing = f"{i + 1}/{len(names)} {name}"
            kept = {"values": EXPERIMENTS[name].measure(lab), "environment": dict(present)}
            store.save_experiment(name, kept)
        values[name] = kept["values"]
    sections = tuple(_section(EXPERIMENTS[name], found, settings) for name, found in values.items())
    return StudyResult(sections, values, store.settings, present)


def _check(pipe: DiffusionPipeline) -> None:
    try:
        unconditional_run(pipe, 1, 1, 0)
    except ConfigError:
        raise ConfigError(
            f"study: expected an unconditional pipeline, got {type(pipe).__name__}, which needs a prompt or another "
            "input. This does not invent one. Use `modiff sample` with --prompt or --label to see its images."
        ) from None


def _section(experiment: Experiment, values: Values, settings: StudySettings) -> StudySection:
    shown = experiment.show(values)
    return StudySection(
        name=experiment.name,
        title=experiment.title,
        printed=experiment.printed,
        found=shown.found,
        why=shown.why,
        command=command(settings, experiment.name),
    )


def command(settings: StudySettings, name: str) -> str:
    """What to type for one experiment; options at their defaults are left out."""
    words = ["python", "-m", "experiments", name, "--model", settings.model, "--preset", settings.depth]
    default = StudySettings()
    for option, value, usual in (
        ("--steps", settings.steps, default.steps),
        ("-n", settings.num_images, IMAGES[settings.depth]),
        ("--seed", settings.seed, default.seed),
    ):
        words += [option, str(value)] if value != usual else []
    return shlex.join(words)


def _origin(result: StudyResult) -> Section:
    columns = (Column("name", numeric=False), Column("value", numeric=False))
    facts = {**result.settings, **dict(result.environment)}
    rows = tuple((Cell(key), Cell("none" if value is None else str(value))) for key, value in facts.items())
    return Section("Settings and machine", (Table("study-origin", "What shaped the figures.", columns, rows),))
