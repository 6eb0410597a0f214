"""`modiff demo` end to end on a tiny folder, and each way it can go wrong: one line, exit code 2, nothing half done."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from PIL import Image

from modiff.evaluate import demo as logic
from tests.cli.commands import assert_one_line, done, modiff
from tests.pixels import saved_pipeline


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved_pipeline(tmp_path / "pipeline")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of the rows: all of them run in tests/evaluate/test_demo.py."""
    rows = [p for p in logic.plans(4) if p.name in ("full precision", "plain W8A4", "modulated W8A4")]
    monkeypatch.setattr(logic, "plans", lambda steps: rows)


def invoke(*arguments: object) -> Result:
    return modiff("demo", "--steps", 4, "--num-images", 2, *arguments)


@pytest.mark.usefixtures("short")
def test_it_prints_the_table_and_writes_picture_and_json(folder: Path, tmp_path: Path) -> None:
    picture, figures = tmp_path / "out" / "grid.png", tmp_path / "out" / "demo.json"
    result = done(invoke("--model", folder, "-o", picture, "--json", figures))
    values = json.loads(figures.read_text())
    assert [r["name"] for r in values["rows"]] == ["full precision", "plain W8A4", "modulated W8A4"]
    for row in values["rows"]:
        assert f"{row['relative_l2']:.4f}" in next(x for x in result.stdout.splitlines() if x.startswith(row["name"]))
    assert {"python", "torch", "diffusers", "modiff", "cpu", "cores", "threads"} <= set(values["environment"])
    assert str(tmp_path) not in figures.read_text()
    with Image.open(picture) as image:
        assert image.height == 2 + 3 * 66
    assert sorted(p.name for p in picture.parent.iterdir()) == ["demo.json", "grid.png"]


@pytest.mark.usefixtures("short")
def test_cifar10_is_one_line_until_its_folder_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modiff.assets.files", {"modiff.assets": tmp_path}.__getitem__)
    picture = tmp_path / "grid.png"
    assert_one_line(invoke("--model", "cifar10", "-o", picture), "python training/make_assets.py --data cifar10")
    assert not picture.exists()
    saved_pipeline(tmp_path / "cifar10")
    assert invoke("--model", "cifar10", "-o", picture).exit_code == 0
    assert picture.exists()


def test_too_few_steps_are_one_line(folder: Path, tmp_path: Path) -> None:
    result = invoke("--model", folder, "-o", tmp_path / "grid.png", "--steps", 2)
    assert_one_line(result, "expected 4 to 1000 steps, got 2")


@pytest.mark.parametrize("option", ["-o", "--json"])
def test_an_output_that_cannot_be_written_stops_it_before_the_model_is_loaded(option: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "below.out"
    others = ["-o", tmp_path / "grid.png"] if option == "--json" else []
    assert_one_line(
        invoke("--model", "absent", *others, option, below), f"{below}: expected a file that can be written"
    )


@pytest.mark.usefixtures("short")
def test_a_full_disk_is_one_line_and_the_table_is_shown_all_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", full)
    picture = tmp_path / "grid.png"
    picture.write_bytes(b"old")
    result = invoke("--model", folder, "-o", picture)
    assert_one_line(result, f"{picture}: expected a file that can be written, got No space left on device")
    assert "modulated W8A4" in result.stdout
    assert picture.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["grid.png", "pipeline"]


def test_ctrl_c_is_one_line_and_exit_code_130(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(logic, "run_config", interrupted)
    assert_one_line(invoke("--model", folder, "-o", tmp_path / "grid.png"), "interrupted", code=130)
    assert [p.name for p in tmp_path.iterdir()] == ["pipeline"]
