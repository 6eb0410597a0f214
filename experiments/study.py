"""Run the experiments, or go on with those that were stopped."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from experiments.experiment import Values
from experiments.lab import IMAGES, Lab, StudySettings, kept
from experiments.paper import EXPERIMENTS, experiment_names
from modiff.errors import ConfigError
from modiff.evaluate.report.document import Cell, Column, Document, Section, Table
from modiff.files import ResumableFolder, check_writable, write_json
from modiff.generate.environment import environment
from modiff.generate.worker import digest
from modiff.generate.worker import settings as settings_of
from modiff.hosts.diffusers.runs import call_inputs

LEAD = (
    "The single-trajectory experiments of the MoDiff paper on this model: what was printed, what came out, and why "
    "they differ. Errors are those of the images to full precision from the same seeds, unless said otherwise; lower "
    "is better. Bit-operations are not speed. Modulated rows have the paper's anchors, with quantized weights "
    "(presets.published). So have the tuned rows of docs/project/study.md, measured at commit b682d91 or before; the "
    "preset now anchors with exact weights."
)


@dataclass(frozen=True)
class StudyResult:
    """Values of each experiment by name, as plain JSON; and what shaped them."""

    values: dict[str, Values]
    settings: dict[str, Any]
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, figures left out."""
        return {"settings": self.settings, "environment": self.environment, "experiments": self.values}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StudyResult:
        """What `to_dict` gave."""
        return cls(values["experiments"], values["settings"], values["environment"])

    def document(self, model: str, title: str = "The trajectory study") -> Document:
        """A report: a section for each experiment, then what shaped the figures. model: what its commands name."""
        sections = [
            EXPERIMENTS[name].section(values, command(self.settings, name, model))
            for name, values in self.values.items()
        ]
        heads = (Column("name", numeric=False), Column("value", numeric=False))
        facts = {**self.settings, **self.environment}
        rows = tuple((Cell(key), Cell("none" if value is None else str(value))) for key, value in facts.items())
        origin = Table("study-origin", "What shaped the figures.", heads, rows)
        return Document(title, LEAD, (*sections, Section("Settings and machine", (origin,))))


def run_study(
    pipe: DiffusionPipeline, names: tuple[str, ...], settings: StudySettings, folder: Path, *, progress: bool = True
) -> StudyResult:
    """Do the experiments with these names, except those that `folder` has the results of.

    Args:
        pipe: unconditional, without modiff; it is unchanged afterwards.
        folder: kept, one JSON file for each experiment and each run, written whole: the same call goes on after a kill.
        progress: a bar on stderr for each experiment.
    Raises: ConfigError for a pipeline that needs a prompt, or a folder of another model or other settings; FormatError
        for a damaged file; OSError that names a file. What was finished is kept.
    Cost: see docs/project/study.md; all of them at "quick" are about 250 trajectories of a batch.
    """
    names = experiment_names(names)
    _check(pipe)
    here = dict(environment())
    job = settings.to_dict() | {
        "pipeline": type(pipe).__name__,
        "model": digest(pipe),
        "schedule": settings_of(pipe.scheduler),
        "modiff": here["modiff"],
        "torch": here["torch"],
    }
    values: dict[str, Values] = {}
    with ResumableFolder(folder, job, record="study.json") as study:
        lab: Lab | None = None
        for i, name in enumerate(names):
            path = folder / "experiments" / f"{name}.json"
            result = kept(path)
            if result is None:
                lab = lab or Lab(pipe, settings, folder / "runs", progress=progress)
                lab.doing = f"{i + 1}/{len(names)} {name}"
                result = {"values": EXPERIMENTS[name].measure(lab), "environment": here}
                check_writable(path)
                write_json(path, result)
            values[name] = result["values"]
        return StudyResult(values, study.job, here)


def _check(pipe: DiffusionPipeline) -> None:
    try:
        call_inputs(pipe, 1, prompt=None, label=None)
    except ConfigError:
        raise ConfigError(
            f"experiments: expected an unconditional pipeline, got {type(pipe).__name__}, which needs a prompt or "
            "another input. This does not invent one. Use `modiff sample` with --prompt or --label to see its images."
        ) from None


def command(settings: dict[str, Any], name: str, model: str) -> str:
    """What to type for one experiment; options at their defaults are left out.

    >>> command(StudySettings(seed=4).to_dict(), "clip", "my model")
    "python -m experiments clip --model 'my model' --preset quick --seed 4"
    """
    words = ["python", "-m", "experiments", name, "--model", model, "--preset", settings["depth"]]
    usual = StudySettings(depth=settings["depth"], num_images=IMAGES[settings["depth"]]).to_dict()
    for option, key in (("--steps", "steps"), ("-n", "num_images"), ("--seed", "seed")):
        words += [option, str(settings[key])] if settings[key] != usual[key] else []
    return shlex.join(words)
