"""`modiff quantize` end to end: a folder whose images are those of the method applied here, and one-line mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from diffusers import DDPMPipeline, DDPMScheduler

import modiff
from modiff.generate.samplers import set_scheduler
from modiff.hosts.diffusers.load import load_pipeline
from modiff.methods.registry import method_config
from modiff.methods.registry import quantize as apply_method
from modiff.model.attach import attachment_of
from tests.cli.commands import assert_one_line, done
from tests.cli.commands import modiff as command
from tests.pixels import pixel_pipeline, saved_pipeline

STEPS = 3
LEARN = {"iterations": 2, "batch": 2, "checks": 1, "patience": 0}
FIELDS: dict[str, dict[str, Any]] = {
    "q_diffusion": {
        "groups": 2,
        "samples": 2,
        "batch": 2,
        "search": "minmax",
        "reconstruction": LEARN | {"learning_rate": 0.1},
        "learning": LEARN | {"learn": "activation_scales", "activations": "quantized"},
    },
    "ptq4dm": {"samples": 2, "batch": 2, "trials": 3},
    "tfmq_dm": {"groups": 2, "samples": 2, "batch": 2, "reconstruction": None, "temporal": LEARN},
    "accuquant": {"samples": 2, "batch": 2, "iterations": 1},
    "modiff": {
        "kind": "static_minmax",
        "groups": 3,
        "samples": 2,
        "batch": 2,
        "rounding": "nearest",
        "search": "minmax",
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_pipeline(tmp_path_factory.mktemp("models") / "pipeline")


def invoke(*arguments: object) -> Result:
    return command("quantize", *arguments, "--steps", STEPS)


def fields(tmp_path: Path, method: str) -> Path:
    path = tmp_path / f"{method}.json"
    path.write_text(json.dumps(FIELDS[method]))
    return path


def images(pipe: Any) -> np.ndarray:
    noise = [torch.Generator().manual_seed(i) for i in range(2)]
    return pipe(batch_size=2, num_inference_steps=STEPS, generator=noise, output_type="np").images


@pytest.mark.parametrize("method", list(FIELDS))
def test_the_folder_makes_the_images_of_the_method_bit_for_bit(folder: Path, tmp_path: Path, method: str) -> None:
    out, figures = tmp_path / "out", tmp_path / "quantize.json"
    result = invoke(folder, "--method", method, "--config", fields(tmp_path, method), "-o", out, "--json", figures)
    done(result)
    pipe = load_pipeline(folder)
    config = method_config(method, values=FIELDS[method], changes={"steps": STEPS})
    report = apply_method(pipe, config, progress=False)
    assert f"{len(report.taken)} layers taken" in result.stdout
    assert f"saved: {out}" in result.stdout
    expected = images(pipe)
    assert np.isfinite(expected).all()
    assert np.array_equal(images(modiff.load(out)), expected)
    values = json.loads(figures.read_text())
    assert values["config"] == config.to_dict()
    assert values["method"] == method
    assert values["layers"] == report.to_dict()["layers"]
    assert values["environment"]["modiff"]


def test_bits_modulation_and_work_folder_are_as_asked_for(folder: Path, tmp_path: Path) -> None:
    chosen = ["--method", "ptq4dm", "--config", fields(tmp_path, "ptq4dm"), "--weight-bits", 4, "--activation-bits", 6]
    result = invoke(folder, *chosen, "--modulated", "--seed", 5, "-o", tmp_path / "out", "--work", tmp_path / "parts")
    done(result)
    settings = {e.setting for e in attachment_of(modiff.load(tmp_path / "out").unet).report.taken}
    assert settings == {"W4A6 modulated", "W8A8 modulated"}  # the first and the last layer have 8
    job = json.loads((tmp_path / "parts" / "job.json").read_text())
    assert job["settings"]["seed"] == 5
    assert not (tmp_path / "out.work").exists()
    again = invoke(folder, *chosen, "--modulated", "-o", tmp_path / "other", "--work", tmp_path / "parts")
    assert_one_line(again, "got one with another settings")
    assert not (tmp_path / "other").exists()


def test_an_interrupted_job_goes_on_from_its_work_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modiff.methods import recipe

    calibrate, chosen = recipe.calibrate, ["--method", "ptq4dm", "--config", fields(tmp_path, "ptq4dm")]

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "calibrate", interrupted)
    result = invoke(folder, *chosen, "-o", tmp_path / "out")
    assert_one_line(result, "interrupted", code=130)
    assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    monkeypatch.setattr(recipe, "calibrate", calibrate)
    shards = {p: p.stat().st_mtime_ns for p in (tmp_path / "out.work" / "calls").glob("*.safetensors")}
    assert shards
    assert invoke(folder, *chosen, "-o", tmp_path / "out").exit_code == 0
    assert {p: p.stat().st_mtime_ns for p in shards} == shards, "kept, not collected again"


def test_another_sampler_is_calibrated_on_and_saved_where_diffusers_can(folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "ddpm"
    DDPMPipeline(pixel_pipeline().unet, DDPMScheduler(prediction_type="v_prediction")).save_pretrained(model)
    chosen = ["--method", "ptq4dm", "--config", fields(tmp_path, "ptq4dm")]
    for name, kind in (("ddim", "DDIMPipeline"), ("euler", "DDPMPipeline")):
        out = tmp_path / name
        assert invoke(model, *chosen, "--scheduler", name, "-o", out).exit_code == 0
        loaded = load_pipeline(out)
        assert type(loaded).__name__ == kind
        assert np.isfinite(images(set_scheduler(loaded, name))).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent", "--method", "ptq4dm"], "absent: expected 'embedded', 'cifar10', a diffusers folder or a hub id"),
        (["{folder}", "--method", "gptq"], "method: expected one of accuquant, "),
        (["{folder}", "--method", "accuquant", "--modulated"], "accuquant: expected no modulation, got it"),
        (["{folder}", "--method", "ptq4dm", "--weight-bits", "1"], "weight_bits: expected None or 2 to 8, got 1"),
        (
            ["{folder}", "--method", "accuquant", "--activation-bits", "32"],
            "AccuquantConfig.activation_bits: expected 2 to 8, got None",
        ),
        (["{folder}", "--method", "ptq4dm", "--config", "absent.json"], "absent.json: expected a JSON file"),
        (["{folder}", "--method", "ptq4dm", "--scheduler", "ddimm"], "scheduler: expected one of ddim, "),
        (["{folder}", "--method", "ptq4dm", "--device", "tpu"], "device: expected cpu"),
        (["{folder}", "--method", "ptq4dm", "--json", "{folder}"], "got Is a directory"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    folder: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = invoke(*[text.format(folder=folder) for text in arguments], "-o", tmp_path / "out")
    assert_one_line(result, message)
    assert list(tmp_path.iterdir()) == []


def test_settings_that_are_no_json_are_one_line(folder: Path, tmp_path: Path) -> None:
    for text in ("{", "[" * 100_000):
        (tmp_path / "settings.json").write_text(text)
        chosen = ["--method", "ptq4dm", "--config", tmp_path / "settings.json"]
        assert_one_line(invoke(folder, *chosen, "-o", tmp_path / "out"), "settings.json: expected a JSON file")


def test_nothing_is_overwritten_and_it_says_so_before_the_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("text")
    result = invoke("absent", "--method", "ptq4dm", "-o", tmp_path / "out")
    assert_one_line(result, "expected a new or an empty folder, got files in it")
    assert (tmp_path / "out" / "mine.txt").read_text() == "text"
