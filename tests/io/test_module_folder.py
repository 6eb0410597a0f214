"""Torch modules to a folder and back: the same codes and output bits; a damaged folder changes nothing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import modiff
from modiff import (
    AttentionConfig,
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
from modiff.io.module_folder import bytes_of
from modiff.model.coders import coders_of
from tests.helpers import assert_same_bits
from tests.model.toys import sample, toy, toy_unet

WEIGHTS = "model.safetensors"
STATIC = ModiffConfig(layer=LayerConfig(weight=WeightConfig(bits=4), activation=QuantizerConfig(bits=8, dynamic=False)))


def outputs_of(model: nn.Module) -> list[torch.Tensor]:
    with modiff.trajectory(model):
        return sample(model)


def assert_equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert_same_bits(a, b)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = toy()
    modiff.apply(model, presets.w4a8())
    modiff.save(model, tmp_path / "saved")
    return tmp_path / "saved"


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
    modiff.apply(model, configs[preset] if preset in configs else getattr(presets, preset)())
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
    modiff.apply(model, config)
    modiff.save(model, tmp_path / "before")
    modiff.calibrate(model, lambda: outputs_of(model))
    expected = outputs_of(model)
    modiff.save(model, tmp_path / "saved")
    loaded = modiff.load(tmp_path / "saved", into=toy_unet(1))
    assert_equal(outputs_of(loaded), expected)
    for name, coder in coders_of(loaded).items():
        ours, theirs = coder.state_dict_tensors(), coders_of(model)[name].state_dict_tensors()
        assert ours.keys() == theirs.keys() != set()
        for key in ours:
            assert_same_bits(ours[key], theirs[key])
    with pytest.raises(CalibrationError, match=r"modiff\.calibrate"):
        outputs_of(modiff.load(tmp_path / "before", into=toy_unet(1)))


def test_a_set_of_scales_for_each_step_comes_back(tmp_path):
    activation = QuantizerConfig(bits=8, dynamic=False, step_groups=0)
    config = ModiffConfig(layer=LayerConfig(activation=activation, modulation=None))
    model = toy()
    modiff.apply(model, config)
    modiff.calibrate(model, lambda: outputs_of(model))
    expected = outputs_of(model)
    modiff.save(model, tmp_path / "saved")
    assert_equal(outputs_of(modiff.load(tmp_path / "saved", into=toy(1))), expected)


def test_learned_codes_come_back(tmp_path):
    model = toy()
    modiff.apply(model, presets.w4a8())
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
    modiff.apply(model, presets.w4a8())
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
    modiff.apply(model, presets.w4a8())
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
        model, dataclasses.replace(presets.w8a8(), overrides=(("*to_?", LayerConfig(weight=WeightConfig(bits=None))),))
    )
    expected = outputs_of(model)
    modiff.save(model, tmp_path / "saved")
    assert_equal(outputs_of(modiff.load(tmp_path / "saved", into=toy(1))), expected)


# ------------------------------------------------------------------------------------------------- refusals


def edit_config(folder: Path, change: Callable[[dict], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def entry(config: dict) -> dict:
    return config["quantization_config"]


def first_row(tensors: dict, name: str, value: float) -> None:
    tensors[name][0] = value


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda f: [p.unlink() for p in f.iterdir()], "config.json: expected the config of a saved model"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "expected model.safetensors, got none"),
    "cut": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-1]), "damaged or was cut"),
    "garbled config": (lambda f: (f / "config.json").write_text("{"), "got damaged JSON"),
    "deep config": (lambda f: (f / "config.json").write_text("[" * 100_000), "got damaged JSON"),
    "list config": (lambda f: (f / "config.json").write_text("[]"), "expected the config of a saved model, got list"),
    "another class": (
        lambda f: edit_config(f, lambda c: c.update(modiff_module="UNet")),
        "expected the config of a Toy, got one of 'UNet'",
    ),
    "another version": (
        lambda f: edit_config(f, lambda c: entry(c).update(version=99)),
        "expected format version 1, got 99",
    ),
    "another layer": (
        lambda f: edit_config(f, lambda c: entry(c)["layers"].update({"attention.to_z": {"config": 0}})),
        "expected a layer attention.to_z in Toy that modiff can replace, got no such module",
    ),
    "no layer there": (
        lambda f: edit_config(f, lambda c: entry(c)["layers"].update(norm={"config": 0})),
        "expected a layer norm in Toy that modiff can replace, got a GroupNorm there",
    ),
    "a layer less": (
        lambda f: edit_config(f, lambda c: entry(c)["layers"].pop("body")),
        "expected 26 tensors, got an unknown body.weight_scale",
    ),
    "more bits": (
        lambda f: edit_config(f, lambda c: entry(c)["layer_configs"][0]["weight"].update(bits=8)),
        r"of shape \(16, 16\) in torch.int8, got \(16, 8\) in torch.uint8|of shape \(16, 16, 3, 3\) in torch.int8",
    ),
    "fewer bits": (
        lambda f: edit_config(f, lambda c: entry(c)["layer_configs"][0]["weight"].update(bits=2)),
        "expected codes from -2 to 1",
    ),
    "split outside": (
        lambda f: edit_config(f, lambda c: entry(c)["layers"]["body"].update(split=99)),
        r"body.weight_scale of shape \(16, 2\)",
    ),
    "float config": (
        lambda f: edit_config(f, lambda c: entry(c)["layer_configs"][0]["weight"].update(bits=None)),
        "expected 22 tensors, got an unknown",
    ),
    "missing tensor": (
        lambda f: edit_weights(f, lambda t: t.pop("norm.bias")),
        "expected 27 tensors, got no norm.bias",
    ),
    "missing scale": (
        lambda f: edit_weights(f, lambda t: t.pop("body.weight_scale")),
        "got no body.weight_scale",
    ),
    "extra tensor": (
        lambda f: edit_weights(f, lambda t: t.update(extra=torch.zeros(1))),
        "expected 27 tensors, got an unknown extra",
    ),
    "float codes": (
        lambda f: edit_weights(f, lambda t: t.update({"body.weight": t["body.weight"].float()})),
        r"expected body.weight of shape \(16, 72\) in torch.uint8, got \(16, 72\) in torch.float32",
    ),
    "half scales": (
        lambda f: edit_weights(f, lambda t: t.update({"body.weight_scale": t["body.weight_scale"].half()})),
        r"body.weight_scale of shape \(16, 1\) in torch.float32, got \(16, 1\) in torch.float16",
    ),
    "turned": (
        lambda f: edit_weights(f, lambda t: t.update({"body.weight": t["body.weight"].mT.contiguous()})),
        r"got \(72, 16\)",
    ),
    "nan scale": (
        lambda f: edit_weights(f, lambda t: first_row(t, "body.weight_scale", float("nan"))),
        "expected codes from -8 to 7 and positive scales in body",
    ),
    "negative scale": (
        lambda f: edit_weights(f, lambda t: first_row(t, "body.weight_scale", -1.0)),
        "positive scales in body",
    ),
    "scales of nobody": (
        lambda f: (
            edit_config(f, lambda c: entry(c).update(scales={"nobody": ["s"]})),
            edit_weights(f, lambda t: t.update({"nobody.activation.s": torch.ones(1)})),
        ),
        "expected a layer or attention module that codes its input, got nobody",
    ),
    "promised scales": (
        lambda f: edit_config(f, lambda c: entry(c).update(scales={"body": ["static.0.scale"]})),
        r"got no body.activation.static.0.scale",
    ),
    "no scale at all": (
        lambda f: (
            edit_config(f, lambda c: entry(c).update(scales={"body": ["nonsense"]})),
            edit_weights(f, lambda t: t.update({"body.activation.nonsense": torch.ones(1)})),
        ),
        "nonsense",
    ),
    "attention of none": (
        lambda f: edit_config(f, lambda c: entry(c)["config"].update(attention=AttentionConfig().to_dict())),
        "expected settings that fit Toy, got: .*attention",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_hostile_folder_gets_one_line_and_changes_nothing(saved, damage):
    change, message = DAMAGES[damage]
    change(saved)
    model, plain = toy(1), toy(1)
    attributes, modules = set(model.__dict__), dict(model.named_modules())
    with pytest.raises(FormatError, match=message) as caught:
        modiff.load(saved, into=model)
    assert "\n" not in str(caught.value)
    assert set(model.__dict__) == attributes
    assert dict(model.named_modules()) == modules
    for (name, ours), (other, theirs) in zip(model.state_dict().items(), plain.state_dict().items(), strict=True):
        assert name == other
        assert_same_bits(ours, theirs)
    assert_equal(sample(model), sample(plain))


def test_a_module_that_carries_modiff_is_refused(saved):
    model = toy()
    modiff.apply(model)
    with pytest.raises(StateError, match="load: expected a plain model, got Toy with modulated layers"):
        modiff.load(saved, into=model)
    modiff.remove(model)


def test_a_module_must_be_given_and_be_of_the_right_kind(saved):
    with pytest.raises(ConfigError, match=r"load: expected into=, a Toy in full precision, got none"):
        modiff.load(saved)
    with pytest.raises(FormatError, match="expected the config of a ToyUNet, got one of 'Toy'"):
        modiff.load(saved, into=toy_unet())
    with pytest.raises(
        FormatError, match=r"nowhere.config\.json: expected the config of a saved model, got No such file"
    ):
        modiff.load(saved / "nowhere", into=toy())


def test_a_plain_module_cannot_be_saved_and_no_folder_appears(tmp_path):
    with pytest.raises(StateError, match="save: expected a model with modulated layers, got a plain Toy"):
        modiff.save(toy(), tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(saved):
    model = toy()
    modiff.apply(model)
    before = (saved / WEIGHTS).read_bytes()
    with pytest.raises(FormatError, match="saved: expected a new or an empty folder, got files in it"):
        modiff.save(model, saved)
    with pytest.raises(FormatError, match="expected a new or an empty folder, got a file"):
        modiff.save(model, saved / WEIGHTS)
    assert (saved / WEIGHTS).read_bytes() == before
    (saved.parent / "empty").mkdir()
    modiff.save(model, saved.parent / "empty")
    modiff.load(saved.parent / "empty", into=toy())


def test_a_layer_wrapped_since_or_offloaded_is_not_saved_half(tmp_path):
    model = toy()
    modiff.apply(model)
    layer = model.attention.to_q
    model.attention.to_q = nn.Sequential(layer)
    with pytest.raises(
        StateError, match=r"attention.to_q: expected the layer that modiff put there.*unload_lora_weights"
    ):
        modiff.save(model, tmp_path / "saved")
    model.attention.to_q = layer
    layer.to(device="meta")
    with pytest.raises(StateError, match=r"attention.to_q: expected a weight in memory, got one on the meta device"):
        modiff.save(model, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []
