"""`modiff analyze`: the files it leaves, and one line with exit code 2 for a mistake."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from modiff.cli import app
from modiff.evaluate.analysis import run as module
from tests.hosts.tiny import HOSTS

FIGURES = ["bit_sweep.png", "distribution.png", "error_growth.png", "layer_errors.png", "reuse.png"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    HOSTS["ddim"].build().save_pretrained(folder)
    return str(folder)


def call(*words: object) -> Result:
    return CliRunner().invoke(app, ["analyze", *map(str, words)])


def test_it_writes_five_figures_and_the_json_and_names_them(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module.analyze.__kwdefaults__, "bits", (4,))  # all seven widths would take seven times as long
    folder = tmp_path / "new" / "folder"
    result = call(model, "-o", folder, "--steps", 3, "--num-images", 1, "--seed", 7, "--config", "tuned:8:3")
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in folder.iterdir()) == ["analysis.json", *FIGURES]
    assert [Path(line).name for line in result.stdout.split()] == [
        "distribution.png", "layer_errors.png", "error_growth.png", "bit_sweep.png", "reuse.png", "analysis.json"
    ]  # fmt: skip
    found = json.loads((folder / "analysis.json").read_text())
    assert (found["settings"]["steps"], found["settings"]["num_images"], found["settings"]["seed"]) == (3, 1, 7)
    assert found["settings"]["config"]["layer"]["activation"]["bits"] == 3
    assert "21/21" in result.stderr


def test_json_goes_where_it_is_told(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.analyze.__kwdefaults__, "bits", (4,))
    monkeypatch.setattr("modiff.evaluate.analysis.figures.figures", lambda analysis, folder: [])
    settings = ["--steps", 2, "--num-images", 1, "--scheduler", "euler"]
    assert call(model, "-o", tmp_path / "figures", "--json", tmp_path / "found.json", *settings).exit_code == 0
    assert list((tmp_path / "figures").iterdir()) == []
    assert json.loads((tmp_path / "found.json").read_text())["layers"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "w9a9"], "'w9a9'"),
        (["--steps", "1"], "expected 2 or more steps"),
        (["--num-images", "0"], "expected 1 or more images"),
        (["--scheduler", "nonsense"], "'nonsense'"),
        (["--json", "/"], "/"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(model: str, tmp_path: Path, words: list[Any], message: str) -> None:
    result = call(model, "-o", tmp_path / "out", *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("modiff: ")]) == 1
    assert "Traceback" not in result.stderr


def test_a_folder_that_is_no_model_is_one_line(tmp_path: Path) -> None:
    result = call(tmp_path, "-o", tmp_path / "out")
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)


def test_an_output_that_cannot_be_a_folder_is_refused_before_the_work(model: str, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    result = call(model, "-o", tmp_path / "taken")
    assert result.exit_code == 2
    assert str(tmp_path / "taken") in result.stderr
    assert (tmp_path / "taken").read_text() == "a file"


def test_help_has_an_example() -> None:
    result = call("--help")
    assert result.exit_code == 0
    assert "modiff analyze embedded" in result.stdout
