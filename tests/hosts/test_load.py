"""Pipelines from folders: float32 whatever was saved, and one clear error for every way a folder can be wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DiffusionPipeline
from safetensors.torch import load_file, save_file

from modiff.errors import FormatError
from modiff.hosts.diffusers.load import load_pipeline
from tests.pixels import pixel_pipeline, saved_pipeline

WEIGHTS = Path("unet/diffusion_pytorch_model.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved_pipeline(tmp_path / "pipeline")


def same_weights(pipe: DiffusionPipeline, other: DiffusionPipeline) -> bool:
    ours, theirs = pipe.unet.state_dict(), other.unet.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k].float(), theirs[k].float()) for k in ours)


def test_a_saved_pipeline_comes_back_quiet_and_with_the_same_weights(folder: Path) -> None:
    for name in (folder, str(folder)):
        pipe = load_pipeline(name)
        assert type(pipe) is DDIMPipeline
        assert same_weights(pipe, pixel_pipeline())
        assert not pipe.unet.training
    assert pipe._progress_bar_config["disable"]


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_half_precision_weights_are_loaded_in_float32(tmp_path: Path, variant: str | None) -> None:
    half = pixel_pipeline().to(torch.float16)
    half.save_pretrained(tmp_path, variant=variant)
    pipe = load_pipeline(tmp_path)
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.float32}
    assert same_weights(pipe, half)


def test_the_embedded_model_goes_by_its_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modiff.hosts.diffusers.load.model_folder", {"embedded": folder}.__getitem__)
    assert same_weights(load_pipeline("embedded"), pixel_pipeline())


def test_a_model_of_the_package_goes_by_its_name_once_its_folder_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modiff.assets.files", {"modiff.assets": tmp_path}.__getitem__)
    with pytest.raises(FormatError, match=r"expected cifar10/model_index\.json .*trained on a GPU.*--data cifar10"):
        load_pipeline("cifar10")
    saved_pipeline(tmp_path / "cifar10")
    assert same_weights(load_pipeline("cifar10"), pixel_pipeline())


def cut(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def garble(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"not a safetensors file, by any measure")


def empty(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")


def drop_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors["conv_in.weight"]
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def reshape_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["conv_in.weight"] = tensors["conv_in.weight"][:4].clone()
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def poison(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["conv_out.bias"][0] = torch.nan
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def pickle_instead(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "unet" / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def unknown_class(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "NoSuchPipeline"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, f"{WEIGHTS}: expected a safetensors file, got SafetensorError"),
        (garble, f"{WEIGHTS}: expected a safetensors file, got SafetensorError"),
        (empty, f"{WEIGHTS}: expected a safetensors file, got SafetensorError"),
        (lambda f: (f / WEIGHTS).unlink(), "unet: expected part of a diffusers pipeline, got OSError"),
        (pickle_instead, "unet: expected part of a diffusers pipeline, got OSError"),
        (drop_a_tensor, "unet: expected weights for every parameter, got none for conv_in.weight (1 in all)"),
        (reshape_a_tensor, "unet: expected part of a diffusers pipeline, got"),
        (poison, "unet: expected finite weights, got NaN or infinity in conv_out.bias"),
        (
            lambda f: (f / "model_index.json").unlink(),
            "pipeline: expected a diffusers folder, got one without model_index",
        ),
        (lambda f: (f / "model_index.json").write_text("{"), "model_index.json: expected part of a diffusers pipeline"),
        (lambda f: (f / "model_index.json").write_text("[" * 100_000), "model_index.json: expected part of a dif"),
        (lambda f: (f / "model_index.json").write_text("[]"), "model_index.json: expected an object with _class_name"),
        (unknown_class, "pipeline: expected part of a diffusers pipeline"),
        (lambda f: (f / "unet/config.json").unlink(), "unet: expected part of a diffusers pipeline"),
        (lambda f: (f / "unet/config.json").write_text("{"), "unet: expected part of a diffusers pipeline"),
        (lambda f: (f / "scheduler/scheduler_config.json").unlink(), "pipeline: expected part of a diffusers pipeline"),
    ],
)
def test_a_damaged_folder_is_one_clear_error(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(FormatError, match=re.escape(message)) as caught:
        load_pipeline(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "got"),
    [
        ("absent", "got no such folder"),
        ("./absent/folder", "got no such folder"),
        ("/absent/folder", "got no such folder"),
        ("someone/unheard-of-model", "the download failed"),
    ],
)
def test_a_name_that_leads_nowhere_is_one_clear_error(model: str, got: str) -> None:
    with pytest.raises(FormatError, match=f"{model}: expected .*{got}") as caught:
        load_pipeline(model)
    assert "\n" not in str(caught.value)


def test_a_file_is_not_a_folder(folder: Path) -> None:
    with pytest.raises(FormatError, match="got a file"):
        load_pipeline(folder / "model_index.json")


@pytest.mark.parametrize("device", ["tpu", "meta", "cuda:99" if not torch.cuda.is_available() else "nonsense"])
def test_a_device_that_is_not_here_is_an_error_before_anything_is_read(device: str) -> None:
    with pytest.raises(FormatError, match="device: expected cpu"):
        load_pipeline("absent", device=device)
