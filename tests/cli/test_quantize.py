"""`modiff quantize` end to end: a folder whose images are those of the method applied here."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from diffusers import DDPMPipeline, DDPMScheduler, DiTPipeline, DiTTransformer2DModel

import modiff
from modiff.generate.samplers import set_scheduler
from modiff.hosts.diffusers.load import load_pipeline
from modiff.methods import recipe
from modiff.methods.registry import method_config
from modiff.methods.registry import quantize as apply_method
from tests.cli.commands import assert_one_line, done
from tests.cli.commands import modiff as command
from tests.hosts.tiny import HOSTS
from tests.pixels import pixel_pipeline

STEPS = 3
LEARN = {"iterations": 2, "batch": 2, "checks": 1, "patience": 0}
LEARNED = {"learn": "activation_scales", "activations": "quantized"}
FIELDS: dict[str, dict[str, Any]] = {
    "q_diffusion": {"groups": 2, "samples": 2, "batch": 2, "search": "minmax", "learning": LEARN | LEARNED},
    "ptq4dm": {"samples": 2, "batch": 2, "trials": 3},
}
FIELDS |= {name: {"groups": 2, "samples": 2, "batch": 2, "pairs": 2} for name in ("ptqd", "tac")}
FIELDS["q_diffusion"]["reconstruction"] = rounding = LEARN | {"learning_rate": 0.1}
FIELDS["qncd"] = FIELDS["ptqd"] | {"reconstruction": rounding, "interval": 1}
FIELDS["eda_dm"] = {"samples": 2, "batch": 2, "reconstruction": rounding | LEARNED | {"learn": "weights_and_scales"}}
FIELDS["gradient_aligned"] = {"groups": 3, "samples": 4, "batch": 2, "temporal": rounding}
FIELDS["gradient_aligned"]["reconstruction"] = rounding | {"held_out": 0.5}


def invoke(folder: Path, method: str, tmp_path: Path, *more: object) -> Result:
    config = tmp_path / f"{method}.json"
    config.write_text(json.dumps(FIELDS[method]))
    return command("quantize", folder, "--method", method, "--settings", config, *more, "--steps", STEPS)


def images(pipe: Any, seeds: range = range(2), **words: float) -> np.ndarray:
    noise = [torch.Generator().manual_seed(i) for i in seeds]
    return pipe(batch_size=len(seeds), num_inference_steps=STEPS, generator=noise, output_type="np", **words).images


def test_the_folder_makes_the_images_of_the_method_bit_for_bit(model: Path, tmp_path: Path) -> None:
    out, figures = tmp_path / "out", tmp_path / "quantize.json"
    result = done(invoke(model, "q_diffusion", tmp_path, "-o", out, "--json", figures))
    pipe = load_pipeline(model)
    config = method_config("q_diffusion", values=FIELDS["q_diffusion"], changes={"steps": STEPS})
    report = apply_method(pipe, config, progress=False)
    assert f"{len(report.taken)} layers taken" in result.stdout
    assert np.array_equal(images(modiff.load(out)), images(pipe))
    values = json.loads(figures.read_text())
    before, after = values["bytes"]
    assert after < 0.5 * before == 0.5 * sum(4 * p.numel() for p in load_pipeline(model).unet.parameters())
    full, saved = (images(p, range(1_000_003, 1_000_007)) for p in (load_pipeline(model), modiff.load(out)))
    error = np.linalg.norm(saved - full) / np.linalg.norm(full)
    assert values["error"]["relative_l2"] == pytest.approx(error, rel=1e-4)
    assert f"networks: {before / 2**20:.2f} MiB before, {after / 2**20:.2f} MiB after\n" in result.stdout
    assert f"of 4 images to full precision: {error:.4f}\n" in result.stdout
    assert_one_line(command("explain", out), "model: expected one in full precision, got")
    assert (values["method"], values["layers"]) == ("q_diffusion", report.to_dict()["layers"])


@pytest.mark.parametrize(("method", "words"), [("qncd", ()), ("eda_dm", ("--modulated",)), ("gradient_aligned", ())])
def test_folders_of_later_methods_make_their_images(method: str, words: tuple, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("modiff.methods.qncd.LEAST", 2 * 64)  # two pairs of 64 values
    pipe = pixel_pipeline()
    pipe.scheduler.register_to_config(prediction_type="epsilon", clip_sample=True)
    pipe.save_pretrained(tmp_path / "noise")
    done(invoke(tmp_path / "noise", method, tmp_path, *words, "-o", tmp_path / "out"))
    pipe, saved = load_pipeline(tmp_path / "noise"), modiff.load(tmp_path / "out")
    config = method_config(method, values=FIELDS[method], changes={"steps": STEPS}, modulated=bool(words))
    apply_method(pipe, config, progress=False)
    full, own, loaded = (images(p) for p in (load_pipeline(tmp_path / "noise"), pipe, saved))
    assert np.linalg.norm(loaded - own) <= (0.25 if words else 0) * np.linalg.norm(own - full), "int8 anchor codes"
    assert ("correction" in saved.scheduler.config) == (method == "qncd")


def test_bits_modulation_and_work_folder_are_those_of_the_options(model: Path, tmp_path: Path) -> None:
    options = ["--weight-bits", 4, "--activation-bits", 6, "--modulated", "--work", tmp_path / "work"]
    done(invoke(model, "ptq4dm", tmp_path, *options, "--seed", 5, "-o", tmp_path / "out"))
    layers = modiff.report(modiff.load(tmp_path / "out")).taken
    assert {e.setting for e in layers} == {"W4A6 modulated", "W8A8 modulated"}  # the first and the last layer have 8
    assert all(e.anchor.startswith("int8 anchor codes") for e in layers), "it samples as it was calibrated"
    assert json.loads((tmp_path / "work" / "job.json").read_text())["settings"]["seed"] == 5
    assert not (tmp_path / "out.work").exists()


def test_an_interrupted_job_goes_on_from_its_work_folder(model: Path, tmp_path: Path, monkeypatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "calibrate", interrupted)
        assert_one_line(invoke(model, "ptq4dm", tmp_path, "-o", tmp_path / "out"), "interrupted", code=130)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.work", "ptq4dm.json"]
    shards = {p: p.stat().st_mtime_ns for p in (tmp_path / "out.work" / "calls").glob("*.safetensors")}
    assert shards
    done(invoke(model, "ptq4dm", tmp_path, "-o", tmp_path / "out"))
    assert {p: p.stat().st_mtime_ns for p in shards} == shards, "kept, not collected again"


def test_a_model_that_takes_text_is_calibrated_on_prompts_and_a_work_folder_keeps_to_them(tmp_path: Path) -> None:
    HOSTS["sd"].build().save_pretrained(tmp_path / "sd")
    words = [tmp_path / "sd", "ptq4dm", tmp_path, "--work", tmp_path / "a.work", "-o"]
    assert_one_line(invoke(*words, tmp_path / "a"), "expected --prompt, got none")
    done(invoke(*words, tmp_path / "a", "--prompt", "a fox"))
    assert_one_line(invoke(*words, tmp_path / "b", "--prompt", "x"), "got one with another run.prompts")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.work", "ptq4dm.json", "sd"]


def test_a_model_of_two_classes_is_compared_on_both_in_turn(tmp_path: Path, monkeypatch) -> None:
    call, classes = DiTPipeline.__call__, []

    @functools.wraps(call)
    def seen(self: DiTPipeline, class_labels: list[int], **words: Any) -> Any:
        classes.append(tuple(class_labels))
        return call(self, class_labels, **words | {"guidance_scale": 1.0})  # guidance asks for class 1000

    monkeypatch.setattr(DiTPipeline, "__call__", seen)
    pipe = HOSTS["dit"].build()
    network = DiTTransformer2DModel(**pipe.transformer.config | {"num_embeds_ada_norm": 2})
    DiTPipeline(network, pipe.vae, pipe.scheduler).save_pretrained(tmp_path / "dit")
    done(invoke(tmp_path / "dit", "ptq4dm", tmp_path, "-o", tmp_path / "out"))
    assert classes[-2:] == [(0, 1, 0, 1)] * 2, "full precision, and the folder"


@pytest.mark.parametrize(
    ("method", "scheduler", "words"),
    [("ptqd", "ddim", {}), ("ptqd", "ddim", {"eta": 1.0}), ("tac", "dpmsolver++", {})],
)
def test_a_corrected_sampler_is_saved_with_the_network_and_samples_with_its_own_noise(
    method: str, scheduler: str, words: dict[str, float], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setitem(FIELDS, method, FIELDS[method] | words)
    DDPMPipeline(pixel_pipeline().unet, DDPMScheduler(prediction_type="v_prediction")).save_pretrained(tmp_path / "d")
    out, figures = tmp_path / "out", tmp_path / "quantize.json"
    result = done(invoke(tmp_path / "d", method, tmp_path, "--scheduler", scheduler, "-o", out, "--json", figures))
    loaded = modiff.load(out)
    assert type(loaded.scheduler).__name__.startswith("Corrected")
    assert f"{'K' if method == 'tac' else 'k'}: " in result.stdout
    pipe = set_scheduler(load_pipeline(tmp_path / "d"), scheduler)
    full, saved = (images(p, range(1_000_003, 1_000_007), **words) for p in (pipe, loaded))
    error = np.linalg.norm(saved - full) / np.linalg.norm(full)
    assert json.loads(figures.read_text())["error"]["relative_l2"] == pytest.approx(error, rel=1e-4)
    apply_method(pipe, method_config(method, values=FIELDS[method], changes={"steps": STEPS}), progress=False)
    assert np.array_equal(images(loaded, **words), images(pipe, **words))
    done(command("sample", out, "--steps", STEPS, "--num-images", 1, "-o", tmp_path / "samples"))
    done(command("generate", out, "--steps", STEPS, "--num-images", 1, "-o", tmp_path / "generated"))
    assert_one_line(command("sample", out, "--steps", 2, "-o", tmp_path / "b"), "expected 3 steps, from")


@pytest.mark.parametrize(("name", "kind"), [("ddim", "DDIMPipeline"), ("euler", "DDPMPipeline")])
def test_another_sampler_is_calibrated_on_and_saved_where_diffusers_can(tmp_path: Path, name: str, kind: str) -> None:
    DDPMPipeline(pixel_pipeline().unet, DDPMScheduler(prediction_type="v_prediction")).save_pretrained(tmp_path / "d")
    done(invoke(tmp_path / "d", "ptq4dm", tmp_path, "--scheduler", name, "-o", tmp_path / "out"))
    loaded = load_pipeline(tmp_path / "out")
    assert type(loaded).__name__ == kind
    assert np.isfinite(images(set_scheduler(loaded, name))).all()
