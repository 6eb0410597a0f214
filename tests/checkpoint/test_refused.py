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
from tests.model.toys import sample, toy, toy_unet

Damage = Callable[[Path], object]
BODY, ERROR, ERROR_SCALE = "body.weight", "body.weight_error", "body.weight_error_scale"


def text(content: str, name: str = "config.json") -> Damage:
    return lambda folder: (folder / name).write_text(content)


def config(change: Callable[[dict], object]) -> Damage:
    """Changes what config.json says of modiff."""

    def damage(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        change(values["quantization_config"])
        (folder / "config.json").write_text(json.dumps(values))

    return damage


def layer_config(**fields: object) -> Damage:
    return config(lambda c: c["layer_configs"][0].update(fields))


def bits(value: int | None) -> Damage:
    return config(lambda c: c["layer_configs"][0]["weight"].update(bits=value))


def layers(**entries: object) -> Damage:
    return config(lambda c: c["layers"].update(entries))


def weights(change: Callable[[dict[str, Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return damage


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Damage:
    return weights(lambda t: t.update({name: change(t[name]).contiguous()}))


def without(*names: str) -> Damage:
    return weights(lambda t: [t.pop(name) for name in names])


def scales(name: str) -> Damage:
    """Measured scales that the layout promises and the files hold."""

    def damage(folder: Path) -> None:
        layer, _, key = name.partition(".activation.")
        config(lambda c: c.update(scales={layer: [key]}))(folder)
        weights(lambda t: t.update({name: torch.ones(1)}))(folder)

    return damage


DAMAGES: dict[str, tuple[Damage, str]] = {
    "empty": (lambda f: [p.unlink() for p in f.iterdir()], "config.json: expected the config of a saved model"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "expected model.safetensors, got none"),
    "cut": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-1]), "missing or damaged"),
    "garbled config": (text("{"), "config of a saved model, got "),
    "deep config": (text("[" * 100_000), "expected the config of a saved model, got "),
    "list config": (text("[]"), "saved model, got TypeError: a JSON list"),
    "another class": (text('{"modiff_module": "UNet"}'), "expected the config of a Toy, got one of 'UNet'"),
    "another version": (config(lambda c: c.update(version=99)), "expected format version 1, got 99"),
    "another layer": (layers(**{"attention.to_z": {"config": 0}}), "a layer attention.to_z in Toy .* no such module"),
    "not a layer": (layers(norm={"config": 0}), "a layer norm in Toy that modiff can replace, got a GroupNorm there"),
    "fewer layers": (config(lambda c: c["layers"].pop("body")), "expected 26 tensors, got an unknown body.weight_scal"),
    "more bits": (bits(8), r"of shape \(16, 16(, 3, 3)?\) in torch.int8, got .* in torch.uint8"),
    "fewer bits": (bits(2), "expected codes from -2 to 1"),
    "float config": (bits(None), "expected 22 tensors, got an unknown"),
    "split outside": (layers(body={"config": 0, "split": 99}), r"body.weight_scale of shape \(16, 2\)"),
    "missing tensor": (without("norm.bias"), "expected 27 tensors, got no norm.bias"),
    "missing scale": (without("body.weight_scale"), "got no body.weight_scale"),
    "extra tensor": (weights(lambda t: t.update(extra=torch.zeros(1))), "expected 27 tensors, got an unknown extra"),
    "float codes": (changed(BODY, Tensor.float), r"weight of shape \(16, 72\) in torch.uint8, got .* in torch.float32"),
    "half scales": (changed("body.weight_scale", Tensor.half), r"weight_scale of shape .* in torch.float32, got .*16"),
    "turned": (changed(BODY, lambda t: t.mT), r"got \(72, 16\)"),
    "nan scale": (changed("body.weight_scale", lambda t: t * torch.nan), "from -8 to 7 and positive scales in body"),
    "negative scale": (changed("body.weight_scale", Tensor.neg), "positive scales in body"),
    "scales of nobody": (scales("nobody.activation.s"), "attention module that quantizes its input, got nobody"),
    "promised scales": (config(lambda c: c.update(scales={"body": ["s.0"]})), "got no body.activation.s.0"),
    "unknown scales": (scales("body.activation.nonsense"), "nonsense"),
    "no attention": (config(lambda c: c["config"].update(attention=AttentionConfig().to_dict())), "Toy, .*attention"),
}  # fmt: skip
ANCHORS: dict[str, tuple[Damage, str]] = {
    "codes not named": (layers(body={"config": 0}), "expected 35 tensors, got an unknown body.weight_error"),
    "unknown kind": (layers(body={"config": 0, "anchor_weights": 8}), "expected 'quantized' or 'int8'.* body, got 8"),
    "a list": (layers(body={"config": 0, "anchor_weights": []}), r"expected 'quantized' or 'int8'.* body, got \[\]"),
    "of no use": (config(lambda c: c["layer_configs"][0]["modulation"].update(anchor_weights="quantized")),
                  "expected no anchor codes for .*, as its config has no use for them, got int8"),
    "plain layer": (layer_config(modulation=None), "expected no anchor codes for "),
    "no codes": (without(ERROR), "got no body.weight_error"),
    "no error scale": (without(ERROR_SCALE), "got no body.weight_error_scale"),
    "neither": (without(ERROR, ERROR_SCALE), "got no body.weight_error"),
    "float errors": (changed(ERROR, Tensor.float), "weight_error of shape .* in torch.int8, got .* in torch.float32"),
    "nibbles": (weights(lambda t: t.update({ERROR: t[BODY].clone()})), r"\(16, 16, 3, 3\) in torch.int8, got \(16, 72"),
    "two scales": (changed(ERROR_SCALE, lambda t: t.repeat(1, 2)), r"of shape \(16, 1\) in torch.float32, got \(16, 2"),
    "nan error scale": (changed(ERROR_SCALE, lambda t: t * torch.nan), "positive scales in body.weight_error, got oth"),
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
    assert list(model.state_dict()) == list(plain.state_dict())
    assert_equal(list(model.state_dict().values()), list(plain.state_dict().values()))
    assert_equal(sample(model), sample(plain))


def test_the_module_to_load_into_must_be_plain_and_of_the_right_class(saved):
    model = applied()
    with pytest.raises(StateError, match="load: expected a plain model, got Toy with modulated layers"):
        modiff.load(saved, into=model)
    with pytest.raises(ConfigError, match=r"load: expected into=, a Toy in full precision, got none"):
        modiff.load(saved)
    with pytest.raises(FormatError, match="expected the config of a ToyUNet, got one of 'Toy'"):
        modiff.load(saved, into=toy_unet())
    with pytest.raises(FormatError, match=r"nowhere.config\.json: expected the config of a saved model, got FileNotF"):
        modiff.load(saved / "nowhere", into=toy())


def wrapped() -> nn.Module:
    model = applied()
    model.attention.to_q = nn.Sequential(model.attention.to_q)
    return model


def offloaded() -> nn.Module:
    model = applied()
    model.attention.to_q.to(device="meta")
    return model


def packed() -> nn.Module:
    model = applied(presets.w4a8())
    modiff.pack(model)
    return model


@pytest.mark.parametrize(
    ("build", "anchors", "error", "message"),
    [
        (toy, "quantized", StateError, "save: expected a model with modulated layers, got a plain Toy"),
        (wrapped, "quantized", StateError, r"attention.to_q: expected the layer that modiff put there.*unload_lora"),
        (offloaded, "quantized", StateError, r"attention.to_q: expected a weight in memory, got one on the meta dev"),
        (packed, "int8", StateError, "body: expected a float weight, got a packed one without anchor codes"),
        (applied, "int8", ConfigError, "save.anchor_weights: expected 'quantized' for Toy, got 'int8'"),
    ],
)
def test_what_cannot_be_saved_is_refused_and_no_folder_appears(tmp_path, build, anchors, error, message):
    with pytest.raises(error, match=message):
        modiff.save(build(), tmp_path / "saved", anchor_weights=anchors)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(saved):
    before = (saved / WEIGHTS).read_bytes()
    with pytest.raises(FormatError, match="saved: expected a new or an empty folder, got files in it"):
        modiff.save(applied(), saved)
    with pytest.raises(FormatError, match="expected a new or an empty folder, got a file"):
        modiff.save(applied(), saved / WEIGHTS)
    assert (saved / WEIGHTS).read_bytes() == before
    (saved.parent / "empty").mkdir()
    modiff.save(applied(), saved.parent / "empty")
    modiff.load(saved.parent / "empty", into=toy())
