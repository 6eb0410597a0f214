"""Folders that cannot be loaded, modules that cannot be saved: one line, and nothing is changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import modiff
from modiff import AttentionConfig, ConfigError, FormatError, StateError, presets
from tests.checkpoint.test_module_folder import WEIGHTS, applied, assert_equal
from tests.helpers import assert_same_tensors
from tests.model.toys import sample, toy, toy_unet

Damage = Callable[[Path], object]
BODY, ERROR, ERROR_SCALE = "body.weight", "body.weight_error", "body.weight_error_scale"


def text(content: str, name: str = "config.json") -> Damage:
    return lambda folder: (folder / name).write_text(content)


def damage(change: Callable[[dict, dict[str, Tensor]], object]) -> Damage:
    """Changes what config.json says of modiff, or the tensors."""

    def damaged(folder: Path) -> None:
        values, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / WEIGHTS)
        change(values["quantization_config"], tensors)
        (folder / "config.json").write_text(json.dumps(values))
        save_file(tensors, folder / WEIGHTS)

    return damaged


def layer_config(**fields: object) -> Damage:
    return damage(lambda c, _: c["layer_configs"][0].update(fields))


def layers(**entries: object) -> Damage:
    return damage(lambda c, _: c["layers"].update(entries))


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Damage:
    return damage(lambda _, t: t.update({name: change(t[name]).contiguous()}))


def without(*names: str) -> Damage:
    return damage(lambda _, t: [t.pop(name) for name in names])


def scales(layer: str, key: str) -> Damage:
    """Measured scales that the layout promises and the files hold."""
    tensor = {f"{layer}.activation.{key}": torch.ones(1)}
    return damage(lambda c, t: (c.update(scales={layer: [key]}), t.update(tensor)))


DAMAGES: dict[str, tuple[Damage, str]] = {
    "empty": (lambda f: [p.unlink() for p in f.iterdir()], "config.json: expected the config of a saved model"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "expected model.safetensors, got none"),
    "cut": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-1]), "missing or damaged"),
    "garbled config": (text("{"), "config of a saved model, got "),
    "another class": (text('{"modiff_module": "UNet"}'), "expected the config of a Toy, got one of 'UNet'"),
    "another layer": (layers(**{"attention.to_z": {"config": 0}}), "a layer attention.to_z in Toy .* no such module"),
    "not a layer": (layers(norm={"config": 0}), "a layer norm in Toy that modiff can replace, got a GroupNorm there"),
    "fewer layers": (damage(lambda c, _: c["layers"].pop("body")), "expected 26 tensors, got an unknown body.weight_"),
    "more bits": (layer_config(weight={"bits": 8}), r"\(16, 16(, 3, 3)?\) in torch.int8, got .* in torch.uint8"),
    "fewer bits": (layer_config(weight={"bits": 2}), "expected codes from -2 to 1"),
    "float config": (layer_config(weight={"bits": None}), "expected 22 tensors, got an unknown"),
    "split outside": (layers(body={"config": 0, "split": 99}), r"body.weight_scale of shape \(16, 2\)"),
    "missing tensor": (without("norm.bias"), "expected 27 tensors, got no norm.bias"),
    "float codes": (changed(BODY, Tensor.float), r"weight of shape \(16, 72\) in torch.uint8, got .* in torch.float32"),
    "half scales": (changed("body.weight_scale", Tensor.half), r"weight_scale of shape .* in torch.float32, got .*16"),
    "nan scale": (changed("body.weight_scale", lambda t: t * torch.nan), "from -8 to 7 and positive scales in body"),
    "negative scale": (changed("body.weight_scale", Tensor.neg), "positive scales in body"),
    "scales of nobody": (scales("nobody", "s"), "attention module that quantizes its input, got nobody"),
    "promised scales": (damage(lambda c, _: c.update(scales={"body": ["s.0"]})), "got no body.activation.s.0"),
    "unknown scales": (scales("body", "nonsense"), "nonsense"),
    "no attention": (damage(lambda c, _: c["config"].update(attention=AttentionConfig().to_dict())), "Toy, .*atten"),
}  # fmt: skip
ANCHORS: dict[str, tuple[Damage, str]] = {
    "codes not named": (layers(body={"config": 0}), "expected 35 tensors, got an unknown body.weight_error"),
    "unknown kind": (layers(body={"config": 0, "anchor_weights": 8}), "expected 'quantized' or 'int8'.* body, got 8"),
    "of no use": (damage(lambda c, _: c["layer_configs"][0]["modulation"].update(anchor_weights="quantized")),
                  "expected no anchor codes for .*, as its config has no use for them, got int8"),
    "plain layer": (layer_config(modulation=None), "expected no anchor codes for "),
    "no codes": (without(ERROR), "got no body.weight_error"),
    "neither": (without(ERROR, ERROR_SCALE), "got no body.weight_error"),
    "float errors": (changed(ERROR, Tensor.float), "weight_error of shape .* in torch.int8, got .* in torch.float32"),
    "two scales": (changed(ERROR_SCALE, lambda t: t.repeat(1, 2)), r"of shape \(16, 1\) in torch.float32, got \(16, 2"),
    "negative error scale": (changed(ERROR_SCALE, Tensor.neg), "positive scales in body.weight_error"),
}  # fmt: skip


@pytest.mark.parametrize("damage", [*DAMAGES, *ANCHORS])
def test_a_damaged_or_hostile_folder_gets_one_line_and_changes_nothing(tmp_path, damage):
    anchors = "int8" if damage in ANCHORS else "quantized"
    modiff.save(applied(presets.w4a8()), tmp_path / "saved", anchor_weights=anchors)
    change, message = (DAMAGES | ANCHORS)[damage]
    change(tmp_path / "saved")
    model, plain = toy(1), toy(1)
    attributes, modules = set(model.__dict__), dict(model.named_modules())
    with pytest.raises(FormatError, match=message) as caught:
        modiff.load(tmp_path / "saved", into=model)
    assert "\n" not in str(caught.value)
    assert set(model.__dict__) == attributes
    assert dict(model.named_modules()) == modules
    assert_same_tensors(model.state_dict(), plain.state_dict())
    assert_equal(sample(model), sample(plain))


def test_the_module_to_load_into_must_be_plain_and_of_the_right_class(saved):
    model = applied()
    with pytest.raises(StateError, match="load: expected a plain model, got Toy with modulated layers"):
        modiff.load(saved, into=model)
    with pytest.raises(ConfigError, match=r"load: expected into=, a Toy in full precision, got none"):
        modiff.load(saved)
    with pytest.raises(ConfigError, match=r"load\.dtype: expected a torch dtype, got 'float16'"):
        modiff.load(saved, into=toy(), dtype="float16")
    with pytest.raises(FormatError, match="expected the config of a ToyUNet, got one of 'Toy'"):
        modiff.load(saved, into=toy_unet())
    with pytest.raises(FormatError, match=r"nowhere.config\.json: expected the config of a saved model, got FileNotF"):
        modiff.load(saved / "nowhere", into=toy())


def wrap(model: nn.Module) -> None:
    model.attention.to_q = nn.Sequential(model.attention.to_q)


def lose_scales(model: nn.Module) -> None:
    modiff.pack(model)
    model.body.weight_scale = None


@pytest.mark.parametrize(
    ("config", "change", "anchors", "error", "message"),
    [
        (None, modiff.remove, "quantized", StateError, "save: expected a model with modulated layers, got a plain Toy"),
        (None, wrap, "quantized", StateError, r"attention.to_q: expected the layer that modiff put there, got another"),
        (None, lambda m: m.body.to(device="meta"), "quantized", StateError, "body: expected a weight in memory, got"),
        (presets.w4a8(), lose_scales, "quantized", StateError, "expected the buffer weight_scale, got none"),
        (presets.w4a8(), modiff.pack, "int8", StateError, "body: expected a float weight, got a packed one without"),
        (None, lambda m: m, "int8", ConfigError, "save.anchor_weights: expected 'quantized' for Toy, got 'int8'"),
    ],
)
def test_what_cannot_be_saved_is_refused_and_no_folder_appears(tmp_path, config, change, anchors, error, message):
    model = applied(config)
    change(model)
    with pytest.raises(error, match=message):
        modiff.save(model, tmp_path / "saved", anchor_weights=anchors)
    assert list(tmp_path.iterdir()) == []
