"""`modiff sample` end to end on a tiny folder, also interrupted for real."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from click.testing import Result
from PIL import Image

from modiff import presets
from tests.cli.commands import done, modiff
from tests.helpers import hears_ctrl_c
from tests.pixels import pixel_pipeline


def invoke(*arguments: object) -> Result:
    return done(modiff("sample", *arguments, "--steps", 3, "--num-images", 2))


def images(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))])


def test_it_writes_the_images_that_diffusers_would(model: Path, tmp_path: Path) -> None:
    assert "2 written, 0 kept" in invoke(model, "-o", tmp_path).stdout
    noise = [torch.Generator().manual_seed(i) for i in range(2)]
    expected = pixel_pipeline()(batch_size=2, num_inference_steps=3, generator=noise, output_type="np").images
    # rounding to 8 bits; loaded weights lie elsewhere in memory, so sums may round otherwise
    assert np.abs(images(tmp_path) - 255 * expected[..., 0]).max() <= 0.51
    assert "2 kept" in invoke(model, "-o", tmp_path).stdout


def test_config_scheduler_and_json(model: Path, tmp_path: Path) -> None:
    figures, config = tmp_path / "sample.json", tmp_path / "mine.json"
    config.write_text(presets.plain(8, 3).to_json())
    invoke(model, "--config", config, "--scheduler", "euler", "-o", tmp_path / "out", "--json", figures)
    values = json.loads(figures.read_text())
    assert values["files"] == ["00000.png", "00001.png"]
    assert values["settings"]["scheduler"] == "euler"
    assert values["settings"]["config"] == presets.plain(8, 3).to_dict()
    assert {layer["setting"] for layer in values["layers"]} == {"full precision", "W8A3 plain"}
    assert values["environment"]["modiff"]
    invoke(model, "--scheduler", "euler", "-o", tmp_path / "full")
    assert 2 < np.abs(images(tmp_path / "out") - images(tmp_path / "full")).max()


def test_ctrl_c_ends_the_process_with_one_line_and_leaves_whole_files_only(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from modiff.cli import app; app()", "sample", str(model), "-o", str(tmp_path)]
    options = ["--steps", "20", "--num-images", "10000", "--batch-size", "1"]
    process = subprocess.Popen(
        [*command, *options], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=hears_ctrl_c
    )
    try:
        until = time.monotonic() + 120
        while not (tmp_path / "00000.png").exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1] == "modiff: interrupted. Files that were finished are kept."
    assert "Traceback" not in errors
    assert images(tmp_path).shape[1:] == (8, 8)
    assert {path.suffix for path in tmp_path.glob("[!.]*")} == {".png", ".json"}
