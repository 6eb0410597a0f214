"""`modiff analyze`: the files it leaves."""

import json
from pathlib import Path

import pytest

from modiff.evaluate.analysis import run as module
from tests.cli.commands import done, modiff
from tests.hosts.tiny import HOSTS

FIGURES = ["layer_errors.png", "error_growth.png", "bit_sweep.png"]


def test_it_writes_three_figures_and_the_json_and_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    HOSTS["ddim"].build().save_pretrained(tmp_path / "model")
    # all seven widths would take seven times as long
    monkeypatch.setitem(module.analyze_pipeline.__kwdefaults__, "bits", (4,))
    folder, results = tmp_path / "new" / "folder", tmp_path / "analysis.json"
    words = ["-o", folder, "--steps", 3, "-n", 1, "--seed", 7, "--config", "tuned:8:3", "--scheduler", "euler"]
    result = done(modiff("analyze", tmp_path / "model", *words, "--json", results))
    assert sorted(p.name for p in folder.iterdir()) == sorted(FIGURES)
    assert [Path(line).name for line in result.stdout.split()] == [*FIGURES, "analysis.json"]
    settings = json.loads(results.read_text())["settings"]
    assert (settings["steps"], settings["num_images"], settings["seed"]) == (3, 1, 7)
    assert settings["config"]["layer"]["activation"]["bits"] == 3
    assert "15/15" in result.stderr
