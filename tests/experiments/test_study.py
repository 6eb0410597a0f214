"""The study end to end: it goes on after a kill, gives the same figures, and refuses what it cannot do."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from experiments import registry
from experiments.__main__ import write_page
from experiments.experiment import Experiment, Shown
from experiments.lab import Lab
from experiments.paper import table4
from experiments.runs import Run
from experiments.settings import StudySettings, settings_for
from experiments.study import StudyResult, command, run_study
from experiments.tables import listing
from modiff import presets
from modiff.errors import ConfigError
from modiff.evaluate.report.page import write_report
from tests.hosts.tiny import HOSTS
from tests.pixels import pixel_pipeline

NAMES = ("first", "second")


def experiment(name: str, bits: tuple[int, ...]) -> Experiment:
    """A small one that samples: plain quantization at some widths."""

    def measure(lab: Lab) -> dict[str, Any]:
        return {"rows": lab.rows([({"bits": b}, Run(steps=2, config=presets.plain(8, b))) for b in bits])}

    def show(values: dict[str, Any]) -> Shown:
        return Shown(
            ("text.", listing(f"table-{name}", "Caption.", values["rows"], [("bits", "bits", "d")])), ("why.",)
        )

    return Experiment(name=name, title=name.title(), printed=("nothing.",), measure=measure, show=show)


@pytest.fixture(autouse=True)
def _two_experiments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "EXPERIMENTS", {})
    for name, bits in zip(NAMES, ((8, 4), (4, 3)), strict=True):
        monkeypatch.setitem(registry.EXPERIMENTS, name, experiment(name, bits))
    monkeypatch.setattr("experiments.study.EXPERIMENTS", registry.EXPERIMENTS)


def study(folder: Path, **options: Any) -> StudyResult:
    settings = settings_for("quick", num_images=2, steps=10, seed=4, experiments=options.pop("experiments", ()))
    return run_study(options.pop("pipe", None) or pixel_pipeline(), settings, folder, progress=False)


def test_every_experiment_is_a_section_with_the_command_that_makes_it(tmp_path: Path) -> None:
    result = study(tmp_path / "work")
    assert [s.title for s in result.report_sections()] == ["First", "Second"]
    assert result.report_sections()[0].blocks[0] == "The paper: nothing."
    assert (
        result.sections[1].command
        == "python -m experiments second --model embedded --preset quick --steps 10 -n 2 --seed 4"
    )
    values = result.to_dict()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert [row["bits"] for row in values["experiments"]["second"]["rows"]] == [4, 3]
    assert {"model", "schedule", "torch", "modiff", "steps", "seed"} <= set(values["settings"])
    write_report(result.document("Title"), tmp_path / "report")
    assert "Settings and machine" in (tmp_path / "report" / "report.html").read_text()
    (only,) = study(tmp_path / "work", experiments=("second",)).sections
    assert only.name == "second"


@pytest.mark.parametrize("after", range(4))
def test_a_killed_study_goes_on_and_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Killed after so many runs were kept; three different ones in all."""
    whole = study(tmp_path / "whole")
    kept: list[str] = []
    measured = Lab._measure

    def dying(self: Lab, run: Run, *rest: Any) -> None:
        if len(kept) == after:
            raise KeyboardInterrupt
        measured(self, run, *rest)
        kept.append(run.key)

    monkeypatch.setattr(Lab, "_measure", dying)
    if after < 3:
        with pytest.raises(KeyboardInterrupt):
            study(tmp_path / "killed")
    again: list[str] = []
    monkeypatch.setattr(Lab, "_measure", lambda self, run, *rest: (measured(self, run, *rest), again.append(run.key)))
    result = study(tmp_path / "killed")
    assert len(again) == 3 - len(kept)
    assert not set(again) & set(kept)
    assert result.values == whole.values
    monkeypatch.setattr("experiments.study.Lab", None)  # nothing is left to be done in one
    assert study(tmp_path / "killed").values == whole.values


def test_another_model_or_setting_needs_another_folder(tmp_path: Path) -> None:
    study(tmp_path, experiments=("first",))
    with pytest.raises(ConfigError, match="got another model"):
        study(tmp_path, pipe=pixel_pipeline(1))
    settings = settings_for("quick", num_images=3, steps=10, seed=4)
    with pytest.raises(ConfigError, match="got another num_images"):
        run_study(pixel_pipeline(), settings, tmp_path, progress=False)


def test_mistakes_are_one_line_and_leave_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected an unconditional pipeline, got DiTPipeline") as caught:
        study(tmp_path / "a", pipe=HOSTS["dit"].build())
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="expected all, or names among first, second, got third"):
        study(tmp_path / "a", experiments=("third",))
    assert not (tmp_path / "a").exists()


def test_settings_are_checked() -> None:
    assert (settings_for("quick").num_images, settings_for("full").num_images) == (8, 32)
    assert settings_for("full").full
    with pytest.raises(ConfigError, match="one of quick, full, got 'deep'"):
        settings_for("deep")
    for field, value in (("steps", 9), ("num_images", 0), ("batch_size", 0)):
        with pytest.raises(ConfigError, match=f"StudySettings.{field}"):
            StudySettings(**{field: value})


def test_a_command_leaves_defaults_out_and_quotes_the_model() -> None:
    assert command(StudySettings(), "table4") == "python -m experiments table4 --model embedded --preset quick"
    full = settings_for("full", model="my model")
    assert command(full, "clip") == "python -m experiments clip --model 'my model' --preset full"


def test_the_page_of_the_docs_holds_all_figures_and_drops_old_ones(tmp_path: Path) -> None:
    from tests.experiments.fake_lab import FakeLab

    registry.EXPERIMENTS["third"] = dataclasses.replace(
        experiment("third", (4,)), show=lambda _: table4.show(table4.measure(FakeLab()))
    )
    docs = tmp_path / "docs"
    (docs / "figures").mkdir(parents=True)
    for name in ("study-old.png", "demo.png"):
        (docs / "figures" / name).write_bytes(b"old")
    written = write_page(study(tmp_path / "work").document(), docs)
    text = (docs / "study.md").read_text()
    assert [p.relative_to(docs).as_posix() for p in written] == ["study.md", "figures/study-table4.png"]
    assert sorted(p.name for p in (docs / "figures").iterdir()) == ["demo.png", "study-table4.png"]
    assert "](figures/study-table4.png)" in text
    assert "The paper: nothing." in text
    assert "compensation is worth a factor of 2" in text
