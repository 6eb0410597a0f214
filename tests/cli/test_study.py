"""`modiff evaluate --study`: what was found is printed and written, and mistakes come before the model is loaded."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from modiff.cli import app
from modiff.cli.study import study
from modiff.errors import ConfigError
from tests.pixels import saved_pipeline


def test_it_prints_each_finding_and_writes_json_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(saved_pipeline(tmp_path / "model"))
    options = {"preset": "quick", "steps": 10, "num_images": 1, "seed": 0, "device": "cpu", "folder": tmp_path / "work"}
    options["beside"] = {"--configs": None}
    study(model, "figure1b", **options, json_file=tmp_path / "out" / "study.json", report=tmp_path / "report")
    printed = capsys.readouterr().out
    assert "Distribution of activations and temporal differences (figure 1b)" in printed
    assert "With 10 DDIM steps the residual's range is" in printed
    values = json.loads((tmp_path / "out" / "study.json").read_text())
    assert list(values["experiments"]) == ["figure1b"]
    page = (tmp_path / "report" / "report.html").read_text()
    assert f"modiff evaluate {model} --study figure1b --preset quick --steps 10 -n 1" in page
    assert (tmp_path / "report" / "figures" / "study-figure1b.png").is_file()


@pytest.mark.parametrize(("names", "preset", "message"), [("figure9", "quick", "figure9"), ("all", "deep", "deep")])
def test_a_wrong_name_costs_no_loading(tmp_path: Path, names: str, preset: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        study("no such model", names, preset=preset, steps=None, num_images=None, seed=0, device="cpu",
              folder=tmp_path / "work", json_file=None, report=None, beside={})  # fmt: skip
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--study", "figure9"], "got figure9. Use for example --study figure1a,table4."),
        (["--study", "all", "--configs", "w8a4"], "--study: expected no --configs beside it, got w8a4."),
        (["--study", "all", "--scheduler", "ddpm"], "--study: expected no --scheduler beside it, got ddpm."),
        (["--study", "all", "--steps", "4"], "StudySettings.steps: expected 10 or more steps, got 4."),
    ],
)
def test_modiff_evaluate_hands_a_study_on_and_a_mistake_is_one_line(words: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["evaluate", "no such model", *words])
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
