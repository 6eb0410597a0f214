"""The command: it goes on after a kill with the same figures, writes report and page, and refuses what it cannot do."""

import json
from pathlib import Path

import pytest

from experiments import study as logic
from experiments.__main__ import main
from experiments.experiment import Experiment, Shown, listing
from experiments.lab import Lab, StudySettings
from experiments.paper import EXPERIMENTS
from experiments.runs import Run
from experiments.study import StudyResult, run_study
from modiff import presets
from tests.pixels import pixel_pipeline, saved_pipeline

NAMES = ("first", "second")
SETTINGS = StudySettings(num_images=2, steps=10, seed=4)


@pytest.fixture
def _two_experiments(monkeypatch):
    """Small ones that sample: plain quantization at some widths, three different runs in all."""
    for name, widths in zip(NAMES, ((8, 4), (4, 3)), strict=True):

        def measure(lab: Lab, widths: tuple[int, ...] = widths) -> dict[str, object]:
            return {"rows": lab.rows([({"bits": b}, Run(steps=2, config=presets.plain(8, b))) for b in widths])}

        def show(values: dict[str, list[dict[str, object]]], name: str = name) -> Shown:
            return Shown(("text.", listing(f"table-{name}", "Caption.", values["rows"], "bits: d")), ("why.",))

        experiment = Experiment(name=name, title=name.title(), printed=("nothing.",), measure=measure, show=show)
        monkeypatch.setitem(EXPERIMENTS, name, experiment)


def study(folder: Path, names: tuple[str, ...] = NAMES, seed: int = 0) -> StudyResult:
    return run_study(pixel_pipeline(seed), names, SETTINGS, folder, progress=False)


@pytest.mark.usefixtures("_two_experiments")
@pytest.mark.parametrize("after", [0, 2])
def test_a_killed_study_goes_on_and_gives_the_same(tmp_path, monkeypatch, after):
    whole = study(tmp_path / "whole")
    measured, done = Lab._measure, []

    def dying(self: Lab, run: Run, *rest: object) -> None:
        if len(done) == after:
            raise KeyboardInterrupt
        measured(self, run, *rest)
        done.append(run.key)

    monkeypatch.setattr(Lab, "_measure", dying)
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path / "killed")
    more: list[str] = []
    monkeypatch.setattr(Lab, "_measure", lambda self, run, *rest: (measured(self, run, *rest), more.append(run.key)))
    assert study(tmp_path / "killed").values == whole.values
    assert len(more) == 3 - len(done)
    assert not set(more) & set(done)
    monkeypatch.setattr(logic, "Lab", None)  # nothing is left to be done in one
    assert study(tmp_path / "killed").values == whole.values


def test_the_command_prints_each_sentence_and_writes_report_page_and_results(tmp_path, capsys):
    model, out, docs = str(saved_pipeline(tmp_path / "model")), tmp_path / "out", tmp_path / "docs"
    (docs / "figures").mkdir(parents=True)
    for name in ("study-old.png", "demo.png"):
        (docs / "figures" / name).write_bytes(b"old")
    words = ["figure1b", "--model", model, "-o", str(out), "--steps", "10", "-n", "1", "--docs", str(docs)]
    assert main(words) == 0
    assert "Here: With 10 DDIM steps the residual's range is" in capsys.readouterr().out
    assert list(json.loads((out / "results.json").read_text())["experiments"]) == ["figure1b"]
    command = f"python -m experiments figure1b --model {model} --preset quick --steps 10 -n 1"
    for page in (out / "report.html", out / "report.md", docs / "project" / "study.md"):
        assert command in page.read_text()
    assert sorted(p.name for p in (docs / "figures").iterdir()) == ["demo.png", "study-figure1b.png"]
    written = (docs / "project" / "study.md").read_bytes()
    assert main(["all", "--model", model, "--results", str(out / "results.json"), "--docs", str(docs)]) == 0
    assert (docs / "project" / "study.md").read_bytes() == written


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["figure9"], "got figure9. Use for example: python -m experiments figure1a table4."),
        (["all", "--steps", "4"], "StudySettings.steps: expected 10 or more steps, got 4."),
    ],
)
def test_a_mistake_is_one_line_and_costs_no_loading(words, message, tmp_path, capsys):
    assert main([*words, "--model", "no such model", "-o", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
