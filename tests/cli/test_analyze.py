"""`modiff analyze`: the files it leaves, and one line with exit code 2 for a mistake."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from modiff.evaluate.analysis import run as module
from tests.cli.commands import assert_one_line, done, modiff
from tests.hosts.tiny import HOSTS

FIGURES = ["bit_sweep.png", "error_growth.png", "layer_errors.png"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    HOSTS["ddim"].build().save_pretrained(folder)
    return str(folder)


def call(*words: object) -> Result:
    return modiff("analyze", *words)


def test_it_writes_three_figures_and_the_json_and_names_them(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        module.analyze_pipeline.__kwdefaults__, "bits", (4,)
    )  # all seven widths would take seven times as long
    folder = tmp_path / "new" / "folder"
    result = call(model, "-o", folder, "--steps", 3, "--num-images", 1, "--seed", 7, "--config", "tuned:8:3")
    done(result)
    assert sorted(p.name for p in folder.iterdir()) == ["analysis.json", *FIGURES]
    assert [Path(line).name for line in result.stdout.split()] == [
        "layer_errors.png", "error_growth.png", "bit_sweep.png", "analysis.json"
    ]  # fmt: skip
    found = json.loads((folder / "analysis.json").read_text())
    assert (found["settings"]["steps"], found["settings"]["num_images"], found["settings"]["seed"]) == (3, 1, 7)
    assert found["settings"]["config"]["layer"]["activation"]["bits"] == 3
    assert "15/15" in result.stderr


def test_json_goes_where_it_is_told(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.analyze_pipeline.__kwdefaults__, "bits", (4,))
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
        (["--num-images", "0"], "expected at least 1 image"),
        (["--scheduler", "nonsense"], "'nonsense'"),
        (["--json", "/"], "/"),
        (["-o", "{taken}"], "taken"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(model: str, tmp_path: Path, words: list[Any], message: str) -> None:
    (tmp_path / "taken").write_text("a file")
    words = [str(word).format(taken=tmp_path / "taken") for word in words]
    assert_one_line(call(model, "-o", tmp_path / "out", *words), message)
    assert (tmp_path / "taken").read_text() == "a file"
