"""Folders that cannot be loaded, modules that cannot be saved: one line, and nothing is changed."""

from __future__ import annotations

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
    ConfigError,
    FormatError,
    StateError,
)
from tests.checkpoint.test_module_folder import WEIGHTS, assert_equal
from tests.helpers import assert_same_bits
from tests.model.toys import sample, toy, toy_unet


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
    "cut": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-1]), "missing or damaged"),
    "garbled config": (lambda f: (f / "config.json").write_text("{"), "config of a saved model, got "),
    "deep config": (
        lambda f: (f / "config.json").write_text("[" * 100_000),
        "expected the config of a saved model, got ",
    ),
    "list config": (
        lambda f: (f / "config.json").write_text("[]"),
        "saved model, got TypeError: a JSON list",
    ),
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
        FormatError, match=r"nowhere.config\.json: expected the config of a saved model, got FileNotFound"
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
