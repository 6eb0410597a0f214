"""`modiff generate` and `modiff export` end to end on tiny folders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from click.testing import Result

from modiff.generate.shards import Manifest, read_images
from tests.cli.commands import assert_one_line, done, modiff
from tests.generate.fakes import content
from tests.hosts.tiny import HOSTS

SMALL = ("--steps", "2", "--batch-size", "1", "--shard-size", "2", "--threads", "1")


def generated(model: Path, folder: Path, num_images: int = 5, *more: object) -> Result:
    return done(modiff("generate", model, "-o", folder, "-n", num_images, *SMALL, *more))


def images(folder: Path) -> np.ndarray:
    return np.concatenate(list(read_images(folder))).astype(int)


def test_it_generates_extends_makes_again_and_tells(model: Path, tmp_path: Path) -> None:
    out, figures = tmp_path / "out", tmp_path / "generate.json"
    assert "3 made, 0 kept" in generated(model, out, 3).stdout
    (out / "shard-000000.safetensors").write_bytes(b"cut")
    result = generated(model, out, 5, "--json", figures)
    assert "5 made, 0 kept" in result.stdout
    assert "made again, because damaged: shard-000000.safetensors\n" in result.stdout
    assert "5/5" in result.stderr
    assert "image/s" in result.stderr
    values = json.loads(figures.read_text())
    assert (values["made"], values["kept"], values["damaged"]) == (5, 0, ["shard-000000.safetensors"])
    assert values["manifest"] == json.loads((out / "manifest.json").read_text())
    assert values["manifest"]["environments"][0]["threads"] == 1
    generated(model, tmp_path / "whole")
    assert content(out) == content(tmp_path / "whole")
    assert "made in 2 environments" in generated(model, out, 7, "--threads", "2").stdout


def test_classes_go_in_turn_and_a_folder_refuses_others(tmp_path: Path) -> None:
    HOSTS["dit"].build().save_pretrained(tmp_path / "dit")
    one, two = tmp_path / "one", tmp_path / "two"
    generated(tmp_path / "dit", one, 3, "--labels", "5-7")
    generated(tmp_path / "dit", one, 5, "--labels", "5-7")
    generated(tmp_path / "dit", two, 5, "--labels", "5,6,7")
    assert content(one) == content(two)
    assert Manifest.load(one).request["labels"] == [5, 6, 7]
    again = modiff("generate", tmp_path / "dit", "-o", one, "-n", 5, *SMALL, "--labels", "5-6")
    assert_one_line(again, "expected a folder of the same job, got one with another labels")


def test_prompts_come_from_a_file(tmp_path: Path) -> None:
    HOSTS["sd"].build().save_pretrained(tmp_path / "sd")
    (tmp_path / "prompts.txt").write_text("a fox\na cat\n")
    generated(tmp_path / "sd", tmp_path / "several", 4, "--prompts", tmp_path / "prompts.txt")
    generated(tmp_path / "sd", tmp_path / "cat", 4, "--prompt", "a cat")
    several, cat = images(tmp_path / "several"), images(tmp_path / "cat")
    assert np.abs(several[1::2] - cat[1::2]).max() <= 2
    assert np.abs(several[0::2] - cat[0::2]).max(axis=(1, 2, 3)).min() > 2
    assert Manifest.load(tmp_path / "several").request["prompts"] == ["a fox", "a cat"]


def test_export_writes_the_array_and_says_what_it_is(model: Path, tmp_path: Path) -> None:
    generated(model, tmp_path / "images")
    path = tmp_path / "images.npz"
    result = done(modiff("export", tmp_path / "images", "-o", path, "-n", 4, "--rgb", "--json", tmp_path / "a.json"))
    assert result.stdout == f"arr_0 (4, 8, 8, 3) uint8: {path}\n"
    assert np.array_equal(np.load(path)["arr_0"], np.repeat(images(tmp_path / "images")[:4], 3, axis=3))
    expected = {"array": "arr_0", "shape": [4, 8, 8, 3], "dtype": "uint8", "file": str(path)}
    assert json.loads((tmp_path / "a.json").read_text()) == expected
