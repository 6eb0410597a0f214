"""`modiff sample` end to end on a tiny folder, and each way it can go wrong."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from PIL import Image

from modiff import presets
from modiff.generate import pictures
from tests.cli.commands import assert_one_line, done, modiff
from tests.helpers import hears_ctrl_c
from tests.pixels import pixel_pipeline, saved_pipeline


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved_pipeline(tmp_path / "pipeline")


def invoke(*arguments: object) -> Result:
    return modiff("sample", *arguments, "--steps", 3, "--num-images", 2)


def images(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))]


def test_it_writes_the_images_that_diffusers_would(folder: Path, tmp_path: Path) -> None:
    assert "2 written, 0 kept" in done(invoke(folder, "-o", tmp_path / "out")).stdout
    noise = [torch.Generator().manual_seed(i) for i in range(2)]
    expected = pixel_pipeline()(batch_size=2, num_inference_steps=3, generator=noise, output_type="np").images
    # rounding to 8 bits; loaded weights lie elsewhere in memory, so sums may round otherwise
    assert np.abs(np.stack(images(tmp_path / "out")) - 255 * expected[..., 0]).max() <= 0.51
    assert "2 kept" in invoke(folder, "-o", tmp_path / "out").stdout


def test_config_scheduler_and_json(folder: Path, tmp_path: Path) -> None:
    out, figures = tmp_path / "out", tmp_path / "sample.json"
    done(invoke(folder, "--config", "plain:8:3", "--scheduler", "euler", "-o", out, "--json", figures))
    values = json.loads(figures.read_text())
    assert values["files"] == ["00000.png", "00001.png"]
    assert values["settings"]["scheduler"] == "euler"
    assert values["settings"]["config"] == presets.plain(8, 3).to_dict()
    assert {layer["setting"] for layer in values["layers"]} == {"full precision", "W8A3 plain"}
    assert values["environment"]["modiff"]
    done(invoke(folder, "--scheduler", "euler", "-o", tmp_path / "full"))
    difference = np.stack(images(out)) - np.stack(images(tmp_path / "full"))
    assert 2 < np.abs(difference).max()


def test_a_config_file_is_the_same_as_its_preset(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(presets.w8a4().to_json())
    assert invoke(folder, "--config", tmp_path / "mine.json", "-o", tmp_path / "a").exit_code == 0
    assert invoke(folder, "--config", "w8a4", "-o", tmp_path / "b").exit_code == 0
    assert np.array_equal(images(tmp_path / "a"), images(tmp_path / "b"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "absent: expected 'embedded', 'cifar10', a diffusers folder or a hub id, got no such folder"),
        (["{folder}", "--scheduler", "ddimm"], "scheduler: expected one of ddim, "),
        (["{folder}", "--scheduler", "flow-euler"], "trained for a noise schedule"),
        (["{folder}", "--config", "w8a5"], "config: expected a preset"),
        (["{folder}", "--config", "plain:8:1"], "expected None, 0 or 2 to 8, got 1"),
        (["{folder}", "--config", "absent.json"], "absent.json: expected a JSON file"),
        (["{folder}", "--prompt", "fox"], "expected no --prompt TEXT, got 'fox'"),
        (["{folder}", "--batch-size", "0"], "--batch-size: expected 1 or more"),
        (["{folder}", "--device", "tpu"], "device: expected cpu"),
        (["{folder}", "--json", "{folder}"], "got Is a directory"),
    ],
)
def test_a_mistake_is_one_line_and_writes_no_image(
    folder: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = invoke(*[text.format(folder=folder) for text in arguments], "-o", tmp_path / "out")
    assert_one_line(result, message)
    assert images(tmp_path / "out") == []


def test_an_output_that_cannot_be_written_stops_it_before_the_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert_one_line(invoke("absent", "-o", tmp_path / "file"), "expected a file that can be written")


def test_a_disk_that_fills_up_keeps_the_images_before(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = pictures.write_atomically, []

    def filling(path: Path, writer: Any) -> None:
        def full(file: Any) -> None:
            file.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        calls.append(path)
        write(path, writer if len(calls) == 1 else full)

    monkeypatch.setattr(pictures, "write_atomically", filling)
    result = invoke(folder, "-o", tmp_path / "out")
    assert_one_line(result, f"{tmp_path / 'out' / '00001.png'}: expected a file that can be written, got No space left")
    assert sorted(p.name for p in (tmp_path / "out").glob("[!.]*")) == ["00000.png", "settings.json"]
    monkeypatch.undo()
    assert "1 written, 1 kept" in invoke(folder, "-o", tmp_path / "out").stdout


def test_ctrl_c_ends_the_process_with_one_line_and_leaves_whole_files_only(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", "from modiff.cli import app; app()", "sample", str(folder), "-o", str(out)]
    options = ["--steps", "20", "--num-images", "10000", "--batch-size", "1"]
    process = subprocess.Popen(
        [*command, *options], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=hears_ctrl_c
    )
    try:
        until = time.monotonic() + 120
        while not (out / "00000.png").exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1] == "modiff: interrupted. Files that were finished are kept."
    assert "Traceback" not in errors
    assert all(image.shape == (8, 8) for image in images(out))
    assert {path.suffix for path in out.glob("[!.]*")} == {".png", ".json"}
