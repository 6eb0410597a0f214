"""Torch modules to a folder and back: the same codes and output bits; a damaged folder changes nothing."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import modiff
from modiff import (
    CalibrationError,
    ConfigError,
    FormatError,
    LayerConfig,
    ModiffConfig,
    QuantizerConfig,
    StateError,
    WeightConfig,
    presets,
)
from modiff.checkpoint.module_folder import bytes_of
from modiff.model.calibrate import quantizers_of
from tests.helpers import assert_same_bits
from tests.model.toys import sample, toy, toy_unet
from tests.recipes import quantized_anchors

WEIGHTS = "model.safetensors"
STATIC = ModiffConfig(layer=LayerConfig(weight=WeightConfig(bits=4), activation=QuantizerConfig(bits=8, dynamic=False)))


def outputs_of(model: nn.Module) -> list[torch.Tensor]:
    with modiff.trajectory(model):
        return sample(model)


def assert_equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert_same_bits(a, b)


MIXED = ModiffConfig(
    layer=LayerConfig(weight=WeightConfig(bits=3), activation=QuantizerConfig(bits=4), rotation="hadamard"),
    overrides=(
        ("*conv1", LayerConfig(weight=WeightConfig(bits=8))),
        ("body", LayerConfig(weight=WeightConfig(bits=None), rotation="hadamard")),
        ("*to_k", LayerConfig(activation=QuantizerConfig(bits=None))),
    ),
)


def mixed(model: nn.Module) -> ModiffConfig:
    names = [name for name, _ in model.named_modules()]
    wanted = [(p, c) for p, c in MIXED.overrides if any(name.endswith(p.lstrip("*")) for name in names)]
    return dataclasses.replace(MIXED, overrides=tuple(wanted))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("make", [toy, toy_unet])
@pytest.mark.parametrize("preset", ["w8a4", "w4a8", "tuned", "plain", "mixed"])
def test_a_module_comes_back_with_the_same_codes_and_output_bits(tmp_path, preset, make, packed):
    model = make()
    configs = {"tuned": presets.tuned(4, 4), "plain": presets.plain(8, 8), "mixed": mixed(model)}
    modiff.apply(model, quantized_anchors(configs[preset] if preset in configs else getattr(presets, preset)()))
    expected = outputs_of(model)
    if packed:
        modiff.pack(model)
    modiff.save(model, tmp_path / "saved")
    assert_equal(outputs_of(model), expected)
    loaded = make(seed=1)
    assert modiff.load(tmp_path / "saved", into=loaded) is loaded
    assert_equal(outputs_of(loaded), expected)
    theirs = dict(model.named_modules())
    for name, layer in loaded.named_modules():
        if getattr(layer, "quantized_weight", None) is not None:
            pairs = zip(
                layer.quantized_weight.codes(layer.weight),
                theirs[name].quantized_weight.codes(theirs[name].weight),
                strict=True,
            )
            for (codes, qparams), (other, scale) in pairs:
                assert_same_bits(codes, other)
                assert_same_bits(qparams.scale, scale.scale)
    with pytest.raises(StateError, match="remove: expected float weights"):
        modiff.remove(loaded)
    modiff.save(loaded, tmp_path / "again")
    written, again = load_file(tmp_path / "saved" / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert list(again) == list(written)
    for key, tensor in written.items():
        assert_same_bits(again[key], tensor)
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "saved" / "config.json").read_bytes()


def test_saving_changes_nothing_and_remove_still_gives_the_bits_back(tmp_path):
    model = toy()
    modiff.apply(model, presets.w4a4())
    modiff.save(model, tmp_path / "saved")
    modiff.remove(model)
    for (name, ours), (_, theirs) in zip(model.named_parameters(), toy().named_parameters(), strict=True):
        assert_same_bits(ours.detach(), theirs.detach())
        assert name


def test_the_files_hold_integers_float32_scales_and_no_pickle(saved):
    assert {path.name for path in saved.iterdir()} == {"config.json", WEIGHTS}
    tensors = load_file(saved / WEIGHTS)
    assert tensors["body.weight"].dtype == torch.uint8
    assert tensors["body.weight"].shape == (16, 72)
    assert tensors["body.weight_scale"].dtype == torch.float32
    assert tensors["conv_in.weight"].dtype == torch.float32
    config = json.loads((saved / "config.json").read_text())
    assert config["modiff_module"] == "Toy"
    assert config["quantization_config"]["quant_method"] == "modiff"


def test_four_bit_checkpoints_take_at_most_six_tenths_of_a_byte_a_weight(tmp_path):
    model = nn.Sequential(*(nn.Linear(128, 128) for _ in range(4)))
    modiff.apply(model, ModiffConfig(layer=LayerConfig(weight=WeightConfig(bits=4)), first_last="quantize"))
    modiff.save(model, tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / WEIGHTS)
    for i in range(4):
        size = tensors[f"{i}.weight"].nbytes + tensors[f"{i}.weight_scale"].nbytes
        assert size == 128 * 64 + 128 * 4
        assert size <= 0.6 * 128 * 128
    biases, header = 4 * 128 * 4, 4096
    assert (tmp_path / "saved" / WEIGHTS).stat().st_size <= 0.6 * 4 * 128 * 128 + biases + header


@pytest.mark.parametrize(
    "config", [STATIC, dataclasses.replace(STATIC, layer=dataclasses.replace(STATIC.layer, modulation=None))]
)
def test_measured_scales_come_back_and_unmeasured_ones_are_still_asked_for(tmp_path, config):
    model = toy_unet()
    modiff.apply(model, quantized_anchors(config))
    modiff.save(model, tmp_path / "before")
    modiff.calibrate(model, lambda: outputs_of(model))
    expected = outputs_of(model)
    modiff.save(model, tmp_path / "saved")
    loaded = modiff.load(tmp_path / "saved", into=toy_unet(1))
    assert_equal(outputs_of(loaded), expected)
    for name, quantizer in quantizers_of(loaded).items():
        ours, theirs = quantizer.state_dict_tensors(), quantizers_of(model)[name].state_dict_tensors()
        assert ours.keys() == theirs.keys() != set()
        for key in ours:
            assert_same_bits(ours[key], theirs[key])
    with pytest.raises(CalibrationError, match=r"modiff\.calibrate"):
        outputs_of(modiff.load(tmp_path / "before", into=toy_unet(1)))


def test_a_set_of_scales_for_each_step_comes_back(tmp_path):
    activation = QuantizerConfig(bits=8, dynamic=False, step_groups=0)
    config = ModiffConfig(layer=LayerConfig(activation=activation, modulation=None))
    model = toy()
    modiff.apply(model, quantized_anchors(config))
    modiff.calibrate(model, lambda: outputs_of(model))
    expected = outputs_of(model)
    modiff.save(model, tmp_path / "saved")
    assert_equal(outputs_of(modiff.load(tmp_path / "saved", into=toy(1))), expected)


def test_learned_codes_come_back(tmp_path):
    model = toy()
    modiff.apply(model, presets.published(4, 8))
    layer = model.body
    ((codes, qparams),) = layer.quantized_weight.codes(layer.weight)
    floats = layer.quantized_weight.floats(layer.weight)
    other = torch.where(floats / qparams.scale > codes, codes + 1, codes - 1).clamp(-8, 7).to(torch.int8)
    rounded = outputs_of(model)
    layer.quantized_weight.fix(((other, qparams),))
    expected = outputs_of(model)
    assert not torch.equal(expected[-1], rounded[-1])
    modiff.save(model, tmp_path / "saved")
    assert_equal(outputs_of(modiff.load(tmp_path / "saved", into=toy())), expected)


def test_large_weights_go_to_several_files(tmp_path):
    model = toy_unet()
    modiff.apply(model, presets.published(4, 8))
    expected = outputs_of(model)
    modiff.save(model, tmp_path / "saved", max_shard_size="4KB")
    shards = sorted((tmp_path / "saved").glob("model-*.safetensors"))
    assert len(shards) > 3
    assert all(sum(t.nbytes for t in load_file(shard).values()) <= 4000 for shard in shards)
    assert_equal(outputs_of(modiff.load(tmp_path / "saved", into=toy_unet(1))), expected)
    shards[1].unlink()
    with pytest.raises(FormatError, match="A shard is missing"):
        modiff.load(tmp_path / "saved", into=toy_unet(1))


@pytest.mark.parametrize(("size", "expected"), [(7, 7), ("7KB", 7_000), ("5 gb", 5 * 10**9), ("20MB", 20 * 10**6)])
def test_sizes_are_bytes_or_what_people_write(size, expected):
    assert bytes_of(size) == expected


@pytest.mark.parametrize("size", [0, -1, True, "", "5", "5TB", "GB", None, 1.5])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(ConfigError, match="max_shard_size: expected bytes or a text such as '200MB'"):
        bytes_of(size)


def test_a_module_on_the_meta_device_is_filled_without_floats_of_its_own(tmp_path):
    model = toy()
    modiff.apply(model, presets.published(4, 8))
    expected = outputs_of(model)
    modiff.save(model, tmp_path / "saved")
    with torch.device("meta"):
        empty = type(toy())()
    loaded = modiff.load(tmp_path / "saved", into=empty.eval())
    assert not any(t.is_meta for t in loaded.state_dict().values())
    assert_equal(outputs_of(loaded), expected)


def test_a_half_precision_module_keeps_its_dtype_and_float32_scales(saved):
    loaded = modiff.load(saved, into=toy(1).bfloat16())
    assert loaded.conv_in.weight.dtype == loaded.body.bias.dtype == torch.bfloat16
    assert loaded.body.weight.dtype == torch.uint8
    scale = load_file(saved / WEIGHTS)["body.weight_scale"]
    assert_same_bits(loaded.body.weight_scale, scale)
    assert (scale != scale.bfloat16().float()).any()


def test_tied_weights_are_written_for_each_layer(tmp_path):
    model = toy()
    model.attention.to_k.weight = model.attention.to_q.weight
    modiff.apply(
        model,
        dataclasses.replace(
            presets.published(8, 8), overrides=(("*to_?", LayerConfig(weight=WeightConfig(bits=None))),)
        ),
    )
    expected = outputs_of(model)
    modiff.save(model, tmp_path / "saved")
    assert_equal(outputs_of(modiff.load(tmp_path / "saved", into=toy(1))), expected)
