"""Pipelines from folders: float32 whatever was saved, and one clear error for every way a folder can be wrong."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

import modiff
from modiff.errors import FormatError
from modiff.hosts.diffusers.load import load_pipeline
from tests.helpers import assert_same_tensors
from tests.hosts.tiny import HOSTS, SMALL

WEIGHTS = Path("unet/diffusion_pytorch_model.safetensors")


@pytest.fixture
def folder(floats, tmp_path):
    return Path(shutil.copytree(floats, tmp_path / "pipeline"))


def test_a_saved_pipeline_comes_back_quiet_and_with_the_same_weights(floats):
    for name in (floats, str(floats)):
        pipe = load_pipeline(name)
        assert type(pipe) is DDIMPipeline
        assert_same_tensors(pipe.unet.state_dict(), SMALL.build().unet.state_dict())
        assert not pipe.unet.training
        assert pipe._progress_bar_config["disable"]


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize("variant", [None, "fp16", "ema"])
def test_every_layout_that_diffusers_writes_is_read_floats_and_quantized_in_float32(tmp_path, variant, shard):
    pipe = HOSTS["sd"].build().to(torch.float16)
    pipe.save_pretrained(tmp_path / "half", variant=variant, max_shard_size=shard)
    shutil.rmtree(tmp_path / "half" / "unet")  # a variant of some components
    pipe.unet.save_pretrained(tmp_path / "half" / "unet", max_shard_size=shard)
    loaded = load_pipeline(tmp_path / "half")
    for name in ("unet", "text_encoder", "vae"):
        assert_same_tensors(getattr(loaded, name).state_dict(), getattr(pipe, name).float().state_dict())
    modiff.apply(pipe, "w4a8")
    pipe.save_pretrained(tmp_path / "saved", variant=variant, max_shard_size=shard)
    modiff.save(pipe, tmp_path / "expected")
    expected = modiff.load(tmp_path / "expected").unet.state_dict()
    for unet in (modiff.load(tmp_path / "saved").unet, modiff.load(tmp_path / "saved" / "unet")):
        assert_same_tensors(unet.state_dict(), expected)


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        values = load_file(folder / WEIGHTS)
        change(values)
        save_file(values, folder / WEIGHTS, {"format": "pt"})

    return damage


def written(name: str | Path, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def missing(name: str | Path) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "unet" / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()


NOT_PART = "expected part of a diffusers pipeline"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, f"{WEIGHTS}: expected a safetensors file, got SafetensorError"),
        (pickled, f"{WEIGHTS.with_suffix('.bin')}: expected safetensors, got a pickle"),
        (
            tensors(lambda t: t.pop("conv_in.weight")),
            "unet: expected weights for every parameter, got none for conv_in.weight (1 in all)",
        ),
        (
            tensors(lambda t: t["conv_out.bias"].fill_(torch.nan)),
            "unet: expected finite weights, got NaN or infinity in conv_out.bias",
        ),
        (missing("model_index.json"), "pipeline: expected a diffusers folder, got one without model_index"),
        (written("model_index.json", b"[]"), f"model_index.json: {NOT_PART}"),
        (written("unet/config.json", b"{"), f"unet: {NOT_PART}"),
    ],
)
def test_a_damaged_folder_is_one_clear_error(folder, damage, message):
    damage(folder)
    with pytest.raises(FormatError, match=re.escape(message)) as caught:
        load_pipeline(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "got"),
    [
        ("absent", "got no such folder"),
        ("./absent/folder", "got no such folder"),
        ("someone/unheard-of-model", "download failed"),
        (__file__, "got a file"),
    ],
)
def test_a_name_that_leads_nowhere_is_one_clear_error(model, got):
    with pytest.raises(FormatError, match=f"{model}: expected .*{got}") as caught:
        load_pipeline(model)
    assert "\n" not in str(caught.value)


def test_a_device_that_is_not_here_is_an_error_before_anything_is_read():
    with pytest.raises(FormatError, match="device: expected cpu"):
        load_pipeline("absent", device="tpu")
