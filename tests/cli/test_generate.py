"""`modiff generate`, `modiff export` and `modiff sample` end to end on tiny folders, also interrupted for real."""

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
from modiff.generate.shards import read_images
from tests.cli.commands import done, modiff
from tests.helpers import hears_ctrl_c
from tests.hosts.tiny import HOSTS
from tests.kills import content
from tests.pixels import pixel_pipeline

SMALL = ("--steps", "2", "--batch-size", "1", "--shard-size", "2", "--threads", "1", "--config", "w8a4")


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
    assert result.stderr == ""  # no bars without a terminal
    assert json.loads(figures.read_text())["manifest"] == json.loads((out / "manifest.json").read_text())
    generated(model, tmp_path / "whole")
    assert content(out) == content(tmp_path / "whole")
    assert "made in 2 environments" in generated(model, out, 7, "--threads", "2").stdout


def test_prompts_come_from_a_file(tmp_path: Path) -> None:
    HOSTS["sd"].build().save_pretrained(tmp_path / "sd")
    (tmp_path / "prompts.txt").write_text("a fox\na cat\n")
    generated(tmp_path / "sd", tmp_path / "several", 4, "--prompts", tmp_path / "prompts.txt")
    generated(tmp_path / "sd", tmp_path / "cat", 4, "--prompt", "a cat")
    several, cat = images(tmp_path / "several"), images(tmp_path / "cat")
    assert np.abs(several[1::2] - cat[1::2]).max() <= 2
    assert np.abs(several[0::2] - cat[0::2]).max(axis=(1, 2, 3)).min() > 2


def test_export_writes_the_array_and_says_what_it_is(model: Path, tmp_path: Path) -> None:
    generated(model, tmp_path / "images")
    path = tmp_path / "images.npz"
    result = done(modiff("export", tmp_path / "images", "-o", path, "-n", 4, "--rgb", "--json", tmp_path / "a.json"))
    assert result.stdout == f"arr_0 (4, 8, 8, 3) uint8: {path}\n"
    assert np.array_equal(np.load(path)["arr_0"], np.repeat(images(tmp_path / "images")[:4], 3, axis=3))
    assert json.loads((tmp_path / "a.json").read_text()).items() >= {"array": "arr_0", "shape": [4, 8, 8, 3]}.items()


def sampled(*arguments: object) -> Result:
    return done(modiff("sample", *arguments, "--steps", 3, "--num-images", 2))


def pictures(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))])


def test_sample_writes_the_images_that_diffusers_would_also_quantized_and_by_another_sampler(
    model: Path, tmp_path: Path
) -> None:
    assert "2 written, 0 kept" in sampled(model, "-o", tmp_path / "a").stdout
    noise = [torch.Generator().manual_seed(i) for i in range(2)]
    expected = pixel_pipeline()(batch_size=2, num_inference_steps=3, generator=noise, output_type="np").images
    # rounding to 8 bits; loaded weights lie elsewhere in memory, so sums may round otherwise
    assert np.abs(pictures(tmp_path / "a") - 255 * expected[..., 0]).max() <= 0.51
    assert "2 kept" in sampled(model, "-o", tmp_path / "a").stdout
    figures, config = tmp_path / "sample.json", tmp_path / "mine.json"
    config.write_text(presets.plain(8, 3).to_json())
    sampled(model, "--config", config, "--scheduler", "euler", "-o", tmp_path / "out", "--json", figures)
    values = json.loads(figures.read_text())
    assert values["files"] == ["00000.png", "00001.png"]
    assert values["settings"].items() >= {"scheduler": "euler", "config": presets.plain(8, 3).to_dict()}.items()
    assert {layer["setting"] for layer in values["layers"]} == {"full precision", "W8A3 plain"}


def test_ctrl_c_ends_the_process_with_one_line_and_leaves_whole_files_only(model: Path, tmp_path: Path) -> None:
    words = ["sample", str(model), "-o", str(tmp_path), "--steps", "20", "-n", "10000", "--batch-size", "1"]
    command = [sys.executable, "-c", "from modiff.cli import app; app()", *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=hears_ctrl_c)
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
    assert pictures(tmp_path).shape[1:] == (8, 8)
    assert {path.suffix for path in tmp_path.glob("[!.]*")} == {".png", ".json"}
