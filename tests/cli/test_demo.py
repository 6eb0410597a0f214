"""`modiff demo` end to end on a tiny folder: table, picture and figures; a full disk leaves the old picture."""

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


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of the rows: all of them run in tests/evaluate/test_demo.py."""
    rows = [p for p in logic.plans(4) if p.name in ("full precision", "plain W8A4", "modulated W8A4")]
    monkeypatch.setattr(logic, "plans", lambda steps: rows)


def invoke(*arguments: object) -> Result:
    return modiff("demo", "--steps", 4, "--num-images", 2, *arguments)


def test_it_prints_the_table_and_writes_picture_and_json(model: Path, tmp_path: Path) -> None:
    picture, figures = tmp_path / "out" / "grid.png", tmp_path / "out" / "demo.json"
    result = done(invoke("--model", model, "-o", picture, "--json", figures))
    values = json.loads(figures.read_text())
    assert [r["name"] for r in values["rows"]] == ["full precision", "plain W8A4", "modulated W8A4"]
    for row in values["rows"]:
        assert f"{row['relative_l2']:.4f}" in next(x for x in result.stdout.splitlines() if x.startswith(row["name"]))
    assert {"python", "torch", "diffusers", "modiff", "cpu", "cores", "threads"} <= set(values["environment"])
    assert str(tmp_path) not in figures.read_text()
    with Image.open(picture) as image:
        assert image.height == 2 + 3 * 66
    assert sorted(p.name for p in picture.parent.iterdir()) == ["demo.json", "grid.png"]


def test_cifar10_is_one_line_until_its_folder_is_there_and_a_full_disk_leaves_the_old_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modiff.assets.files", {"modiff.assets": tmp_path}.__getitem__)
    picture = tmp_path / "grid.png"
    picture.write_bytes(b"old")
    assert_one_line(invoke("--model", "cifar10", "-o", picture), "python training/make_assets.py --data cifar10")
    saved_pipeline(tmp_path / "cifar10")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", full)
    result = invoke("--model", "cifar10", "-o", picture)
    assert_one_line(result, f"{picture}: expected a file that can be written, got No space left on device")
    assert "modulated W8A4" in result.stdout
    assert picture.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cifar10", "grid.png"]
