"""`modiff demo`, `modiff analyze` and `modiff explain` end to end on tiny folders: what they print and leave."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from modiff.evaluate import demo as logic
from modiff.evaluate.analysis import run as module
from tests.cli.commands import assert_one_line, done, modiff
from tests.hosts.tiny import HOSTS

FIGURES = ["layer_errors.png", "error_growth.png", "bit_sweep.png"]
ROWS = ["full precision", "plain W8A4", "modulated W8A4"]


def test_demo_prints_the_table_and_writes_picture_and_json(model: Path, tmp_path: Path, monkeypatch) -> None:
    # three of the rows: all of them run in tests/evaluate/test_demo.py
    rows = [plan for plan in logic.plans(4) if plan.name in ROWS]
    monkeypatch.setattr(logic, "plans", lambda steps: rows)
    picture, figures = tmp_path / "out" / "grid.png", tmp_path / "out" / "demo.json"
    result = done(modiff("demo", "--steps", 4, "-n", 2, "--model", model, "-o", picture, "--json", figures))
    values = json.loads(figures.read_text())
    assert [r["name"] for r in values["rows"]] == ROWS
    for row in values["rows"]:
        assert f"{row['relative_l2']:.4f}" in next(x for x in result.stdout.splitlines() if x.startswith(row["name"]))
    with Image.open(picture) as image:
        assert image.height == 2 + 3 * 98
    assert sorted(p.name for p in picture.parent.iterdir()) == ["demo.json", "grid.png"]


def test_a_quick_demo_has_six_rows_of_the_same_names(model: Path, tmp_path: Path) -> None:
    names = [row.name for row in logic.plans(4)]
    assert len(logic.QUICK) == 6
    words = ("demo", "--quick", "--steps", 4, "-n", 1, "--model", model, "-o", tmp_path / "grid.png", "--json", "-")
    rows = json.loads(done(modiff(*words)).stdout)["rows"]
    assert [row["name"] for row in rows] == [name for name in names if name in logic.QUICK]


def test_an_interrupted_demo_shows_the_rows_that_are_done(model: Path, tmp_path: Path, monkeypatch) -> None:
    def stopping(*arguments: Any) -> dict[str, Any]:
        if arguments[0].name == "plain W8A8":
            raise KeyboardInterrupt
        return row(*arguments)

    row = logic._row
    monkeypatch.setattr(logic, "_row", stopping)
    result = modiff("demo", "--steps", 4, "-n", 2, "--model", model, "-o", tmp_path / "grid.png")
    assert_one_line(result, "interrupted. Files that were finished are kept.", 130)
    assert "a quarter of the steps" in result.stdout
    with Image.open(tmp_path / "grid.png") as image:
        assert image.height == 2 + 2 * 98  # full precision and half the steps


@pytest.mark.parametrize("command", ["demo", "analyze", "explain"])
def test_models_that_take_text_or_classes_draw_what_they_are_told_to(command: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(module.analyze_pipeline.__kwdefaults__, "bits", (4,))
    rows = logic.plans(4)[:1]
    monkeypatch.setattr(logic, "plans", lambda steps: rows)
    rest = {"demo": ("--model", "model"), "analyze": ("model", "-o", "out"), "explain": ("model",)}[command]
    for host, condition in ("sd", ("--prompt", "a fox")), ("dit", ("--label", 3)):
        HOSTS[host].build().save_pretrained("model")
        words = (command, *rest, "--steps", 4, "-n", 1, "--json", "-")
        assert_one_line(modiff(*words), f"expected {condition[0]}, got none")
        values = json.loads(done(modiff(*words, *condition)).stdout)
        assert command == "explain" or values["settings"][f"{condition[0][2:]}s"] == [condition[1]]


def test_analyze_writes_three_figures_and_the_json_and_names_them(model: Path, tmp_path: Path, monkeypatch) -> None:
    # all seven widths would take seven times as long
    monkeypatch.setitem(module.analyze_pipeline.__kwdefaults__, "bits", (4,))
    folder, results = tmp_path / "new" / "folder", tmp_path / "analysis.json"
    words = ["-o", folder, "--steps", 3, "-n", 1, "--seed", 7, "--config", "tuned:8:3", "--scheduler", "euler"]
    result = done(modiff("analyze", model, *words, "--json", results))
    assert sorted(p.name for p in folder.iterdir()) == sorted(FIGURES)
    paths, _, words = result.stdout.partition("\n\n")
    assert [Path(line).name for line in paths.splitlines()] == [*FIGURES, "analysis.json"]
    assert [line.partition(" ")[0] for line in words.splitlines()] == ["Safe", "Modulation", "Layers", "Next:"]
    assert f"analyze {model} --scheduler euler" in words
    settings = json.loads(results.read_text())["settings"]
    assert (settings["seed"], settings["config"]["layer"]["activation"]["bits"]) == (7, 3)


def test_explain_gives_every_layer_a_choice_times_errors_and_what_its_state_costs(model: Path, tmp_path: Path) -> None:
    results = tmp_path / "explain.json"
    words = ["--steps", 3, "-n", 1, "--config", "modulated:8:4", "--tolerance", 0.3, "--json", results]
    text, _, integers = done(modiff("explain", model, *words)).output.partition("on integers:")
    written = json.loads(results.read_text())
    assert f"{written['machine']}; input side: " in text
    for row in written["layers"]:
        (line,) = [line for line in text.splitlines() if line.startswith(f"  {row['name']} ")]
        assert row["choice"] in line
        assert row["reason"] in line
        assert f"state {row['state_bytes'] / 2**20:.2f} MiB" in line
        assert f"plain {1e3 * row['seconds']['plain']:.3f}" in line
    for entry in written["on_integers"]["layers"]:
        if entry["setting"] != "full precision":
            assert f" {entry['execution']}: {entry['why']}\n" in integers
            assert entry["execution"].startswith("integers on ") or entry["why"]
