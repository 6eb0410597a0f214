"""`save_pretrained` right after `modiff.apply`: integers on disk, floats in memory, and no trace after `remove`."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from safetensors.torch import load_file

import modiff
from modiff import ConfigError, ModiffConfig, presets
from modiff.model.apply import install
from modiff.model.attach import attachment_of
from tests.helpers import assert_same_bits
from tests.hosts.test_save import call_small
from tests.pixels import pixel_pipeline
from tests.recipes import quantized_anchors

FILE = "diffusion_pytorch_model.safetensors"


def applied(config: ModiffConfig) -> DiffusionPipeline:
    pipe = pixel_pipeline()
    modiff.apply(pipe, quantized_anchors(config))
    return pipe


def config_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def same_state(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_same_bits(found[name], tensor)


def test_a_model_is_written_as_pack_and_save_would_write_it_and_lives_on_in_floats(tmp_path):
    pipe, packed = applied(presets.published(4, 8)), applied(presets.published(4, 8))
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    expected = call_small(pipe)
    pipe.unet.save_pretrained(tmp_path / "applied")
    modiff.save(pipe.unet, tmp_path / "saved")
    modiff.pack(packed)
    packed.unet.save_pretrained(tmp_path / "packed")
    for other in ("saved", "packed"):
        assert config_in(tmp_path / "applied") == config_in(tmp_path / other)
        same_state(load_file(tmp_path / "applied" / FILE), load_file(tmp_path / other / FILE))
    entry = config_in(tmp_path / "applied")["quantization_config"]
    tensors = load_file(tmp_path / "applied" / FILE)
    assert set(entry["layers"]) == set(attachment_of(pipe.unet).layers)
    assert {tensors[f"{name}.weight"].dtype for name in entry["layers"]} == {torch.uint8}
    same_state(pipe.unet.state_dict(), before)
    assert not attachment_of(pipe.unet).packed
    assert_same_bits(call_small(pipe), expected)
    plain = pixel_pipeline()
    plain.unet = UNet2DModel.from_pretrained(tmp_path / "applied")
    assert_same_bits(call_small(plain), expected)


def test_without_weight_bits_the_floats_are_written_beside_the_settings(tmp_path):
    pipe = applied(presets.published(None, 8))
    pipe.unet.save_pretrained(tmp_path)
    same_state(load_file(tmp_path / FILE), pixel_pipeline().unet.state_dict())
    assert config_in(tmp_path)["quantization_config"]["config"] == presets.published(None, 8).to_dict()
    plain = pixel_pipeline()
    plain.unet = UNet2DModel.from_pretrained(tmp_path)
    assert_same_bits(call_small(plain), call_small(pipe))


def test_what_is_measured_after_the_first_save_is_in_the_second(tmp_path):
    layer = modiff.LayerConfig(activation=modiff.QuantizerConfig(bits=8, granularity="tensor", dynamic=False))
    pipe = applied(ModiffConfig(layer=layer))
    pipe.unet.save_pretrained(tmp_path / "one")
    assert config_in(tmp_path / "one")["quantization_config"]["scales"] == {}
    modiff.calibrate(pipe, lambda: call_small(pipe))
    pipe.unet.save_pretrained(tmp_path / "two")
    assert set(config_in(tmp_path / "two")["quantization_config"]["scales"]) == set(attachment_of(pipe.unet).layers)
    plain = pixel_pipeline()
    plain.unet = UNet2DModel.from_pretrained(tmp_path / "two")
    assert_same_bits(call_small(plain), call_small(pipe))


def test_remove_takes_everything_away_again(tmp_path):
    pipe, plain = pixel_pipeline(), pixel_pipeline()
    plain.unet.save_pretrained(tmp_path / "plain")  # which leaves entries of its own in the config
    for target in (pipe, pipe.unet):
        modiff.apply(target, presets.published(4, 8))
        pipe.unet.save_pretrained(tmp_path / "applied")
        modiff.remove(target)
        assert not hasattr(pipe.unet, "hf_quantizer")
        assert pipe.unet.config == plain.unet.config
        folder = tmp_path / type(target).__name__
        pipe.unet.save_pretrained(folder)
        same_state(load_file(folder / FILE), plain.unet.state_dict())
        assert "quantization_config" not in config_in(folder)


def test_the_live_model_may_be_cast_copied_and_saved_by_the_verb(tmp_path):
    pipe = applied(presets.published(4, 8))
    expected = call_small(pipe)
    copied = copy.deepcopy(pipe)
    layer = next(iter(attachment_of(copied.unet).layers.values()))
    layer.weight.data.zero_()
    copied.unet.save_pretrained(tmp_path / "copy")
    pipe.unet.save_pretrained(tmp_path / "own")
    key = f"{layer.name}.weight"
    copy_file, own_file = (load_file(tmp_path / name / FILE)[key] for name in ("copy", "own"))
    assert len(copy_file.unique()) == 1
    assert len(own_file.unique()) > 1
    pipe.to(torch.float64).to(torch.float32)
    assert_same_bits(call_small(pipe), expected)
    with pytest.raises(ConfigError, match="expected safe_serialization=True, got False"):
        pipe.unet.save_pretrained(tmp_path / "pickle", safe_serialization=False)


def test_the_verb_leaves_no_quantizer_on_a_model_that_had_none(tmp_path):
    pipe = pixel_pipeline()
    install(pipe.unet, presets.published(4, 8))
    modiff.save(pipe.unet, tmp_path / "saved")
    assert config_in(tmp_path / "saved")["quantization_config"]["quant_method"] == "modiff"
    assert "quantization_config" not in pipe.unet.config
    assert not hasattr(pipe.unet, "hf_quantizer")


def test_another_quantizer_on_the_model_is_left_alone():
    pipe = pixel_pipeline()
    pipe.unet.hf_quantizer = other = object()
    modiff.apply(pipe.unet, presets.published(4, 8))
    modiff.remove(pipe.unet)
    assert pipe.unet.hf_quantizer is other
