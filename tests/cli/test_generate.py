"""`modiff generate` end to end on a tiny folder, killed and interrupted for real, and each way it can go wrong."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

from modiff import presets
from modiff.generate.shards import Manifest, read_images
from tests.cli.commands import assert_one_line, done, modiff
from tests.helpers import hears_ctrl_c
from tests.hosts.tiny import HOSTS
from tests.pixels import saved_pipeline

SMALL = ("--steps", "2", "--batch-size", "1", "--shard-size", "2", "--threads", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_pipeline(tmp_path_factory.mktemp("models") / "pipeline")


def invoke(*arguments: object) -> Result:
    return modiff("generate", *arguments)


def generated(model: Path, folder: Path, num_images: int = 5, *more: object) -> Result:
    return done(invoke(model, "-o", folder, "-n", num_images, *SMALL, *more))


def images(folder: Path) -> np.ndarray:
    return np.concatenate(list(read_images(folder))).astype(int)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_it_generates_extends_and_tells(model: Path, tmp_path: Path) -> None:
    out, figures = tmp_path / "out", tmp_path / "generate.json"
    assert "3 made, 0 kept" in generated(model, out, 3).stdout
    result = generated(model, out, 5, "--json", figures)
    assert result.stdout == f"3 made, 2 kept: {out}\n"
    assert "5/5" in result.stderr
    assert "image/s" in result.stderr
    values = json.loads(figures.read_text())
    assert (values["made"], values["kept"], values["damaged"]) == (3, 2, [])
    assert values["manifest"] == json.loads((out / "manifest.json").read_text())
    assert values["manifest"]["environments"][0]["threads"] == 1
    assert images(out).shape == (5, 8, 8, 1)
    generated(model, tmp_path / "whole")
    assert content(out) == content(tmp_path / "whole")


def test_the_images_are_those_of_modiff_sample(model: Path, tmp_path: Path) -> None:
    from PIL import Image

    options = ["--config", "w8a8", "--scheduler", "ddim", "--seed", "3"]
    generated(model, tmp_path / "out", 2, *options)
    done(modiff("sample", model, "-o", tmp_path / "png", "-n", 2, "--steps", 2, "--batch-size", 1, *options))
    pictures = [np.asarray(Image.open(path)).astype(int) for path in sorted((tmp_path / "png").glob("*.png"))]
    # weights lie elsewhere in memory, so sums may round otherwise
    assert np.abs(images(tmp_path / "out")[..., 0] - np.stack(pictures)).max() <= 2


def test_a_damaged_shard_and_a_second_environment_are_told(model: Path, tmp_path: Path) -> None:
    generated(model, tmp_path / "out")
    whole = content(tmp_path / "out")
    (tmp_path / "out" / "shard-000001.safetensors").write_bytes(b"cut")
    result = generated(model, tmp_path / "out")
    assert "2 made, 3 kept" in result.stdout
    assert "made again, because damaged: shard-000001.safetensors" in result.stdout
    assert content(tmp_path / "out") == whole
    assert "made in 2 environments" in generated(model, tmp_path / "out", 7, "--threads", "2").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "absent: expected 'embedded', 'cifar10', a diffusers folder or a hub id, got no such folder"),
        (["{model}", "--config", "w8a5"], "config: expected a preset"),
        (["{model}", "--config", "{static}"], "config: expected dynamic scales, got static ones"),
        (["{model}", "--scheduler", "ddimm"], "scheduler: expected one of ddim, "),
        (["{model}", "--prompt", "fox"], "expected no --prompt TEXT, got 'fox'"),
        (["{model}", "--prompts", "{prompts}"], "expected no --prompt TEXT, got 'a fox'"),
        (["{model}", "--prompts", "absent.txt"], "absent.txt: expected a text file with a prompt in each line"),
        (["{model}", "--prompts", "{prompts}", "--prompt", "a"], "--prompts: expected no --prompt with it"),
        (["{model}", "--labels", "9-0"], "--labels: expected numbers and ranges between commas, got '9-0'"),
        (["{model}", "--device", "tpu"], "device: expected cpu"),
        (["{model}", "-n", "0"], "--num-images: expected 1 or more"),
        (["{model}", "--batch-size", "3", "--shard-size", "4"], "expected a multiple of --batch-size 3"),
        (["{model}", "--seed", str(2**63)], "--seed: expected less than 2**62"),
        (["{model}", "--address", "auto"], "--address: expected --engine ray with it"),
        (["{model}", "--workers", "2"], "--workers: expected --engine ray with it"),
        (["{model}", "--json", "{model}"], "got Is a directory"),
    ],
)
def test_a_mistake_is_one_line_and_writes_no_shard(
    model: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    static = presets.w8a8().to_dict()
    static["layer"]["activation"]["dynamic"] = False
    (tmp_path / "static.json").write_text(json.dumps(static))
    (tmp_path / "prompts.txt").write_text("a fox\na cat\n")
    files = {"static": tmp_path / "static.json", "prompts": tmp_path / "prompts.txt"}
    words = [text.format(model=model, **files) for text in arguments]
    assert_one_line(invoke(words[0], "-o", tmp_path / "out", "-n", "2", "--steps", "2", *words[1:]), message)
    assert not (tmp_path / "out").exists() or content(tmp_path / "out") == {}


def test_classes_go_in_turn_and_a_folder_refuses_others(tmp_path: Path) -> None:
    HOSTS["dit"].build().save_pretrained(tmp_path / "dit")
    one, two = tmp_path / "one", tmp_path / "two"
    generated(tmp_path / "dit", one, 3, "--labels", "5-7")
    generated(tmp_path / "dit", one, 5, "--labels", "5-7")
    generated(tmp_path / "dit", two, 5, "--labels", "5,6,7")
    assert content(one) == content(two)
    assert Manifest.load(one).request["labels"] == [5, 6, 7]
    again = invoke(tmp_path / "dit", "-o", one, "-n", 5, *SMALL, "--labels", "5-6")
    assert_one_line(again, "got one with another labels")


def test_prompts_come_from_a_file(tmp_path: Path) -> None:
    HOSTS["sd"].build().save_pretrained(tmp_path / "sd")
    (tmp_path / "prompts.txt").write_text("a fox\na cat\n")
    generated(tmp_path / "sd", tmp_path / "several", 4, "--prompts", tmp_path / "prompts.txt")
    generated(tmp_path / "sd", tmp_path / "cat", 4, "--prompt", "a cat")
    several, cat = images(tmp_path / "several"), images(tmp_path / "cat")
    assert np.abs(several[1::2] - cat[1::2]).max() <= 2
    assert np.abs(several[0::2] - cat[0::2]).max(axis=(1, 2, 3)).min() > 2
    assert Manifest.load(tmp_path / "several").request["prompts"] == ["a fox", "a cat"]


def test_other_options_in_the_same_folder_are_one_line_and_change_nothing(model: Path, tmp_path: Path) -> None:
    generated(model, tmp_path / "out")
    before = content(tmp_path / "out")
    result = invoke(model, "-o", tmp_path / "out", "-n", 9, *SMALL, "--seed", "1", "--config", "w8a8")
    assert_one_line(result, "expected a folder of the same job, got one with another config and seed")
    assert content(tmp_path / "out") == before


def started(model: Path, folder: Path, shards: int, *more: str) -> subprocess.Popen[str]:
    """A process that generates without end in sight and has just written so many shards."""
    code = "from modiff.cli import app; app()"
    command = [sys.executable, "-c", code, "generate", str(model), "-o", str(folder), "-n", "100000", *SMALL, *more]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=hears_ctrl_c
    )
    until = time.monotonic() + 120
    last = folder / f"shard-{shards - 1:06d}.safetensors"
    while not last.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("shards", [1, 4])
def test_killed_at_any_moment_it_goes_on_to_the_bytes_of_one_run(model: Path, tmp_path: Path, shards: int) -> None:
    process = started(model, tmp_path / "out", shards)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    there = len(list((tmp_path / "out").glob("shard-*")))
    result = generated(model, tmp_path / "out", 2 * there + 3)
    assert f"3 made, {2 * there} kept" in result.stdout
    generated(model, tmp_path / "whole", 2 * there + 3)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_ctrl_c_ends_the_process_with_one_line_and_leaves_whole_shards_only(model: Path, tmp_path: Path) -> None:
    process = started(model, tmp_path / "out", 1)
    try:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1] == "modiff: interrupted. Files that were finished are kept."
    assert "Traceback" not in errors
    there = sorted(path.name for path in (tmp_path / "out").glob("shard-*"))
    assert set(content(tmp_path / "out")) == {*there, "manifest.json", "job.json"}
    generated(model, tmp_path / "out", 2 * len(there))
    assert [shard.file for shard in Manifest.load(tmp_path / "out").shards] == there
