"""Codes of rounding errors for anchors: written, read, and checked as strictly as the other tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import modiff
from modiff import ConfigError, FormatError, StateError, presets
from modiff.checkpoint.layout import Layout
from tests.checkpoint.test_module_folder import WEIGHTS, assert_equal, outputs_of
from tests.checkpoint.test_module_folder_refused import edit_config, edit_weights, entry
from tests.helpers import assert_same_bits
from tests.model.toys import TAKEN, toy, toy_unet

BOTH = ("body.weight_error", "body.weight_error_scale")


def applied(make=toy, config=None) -> nn.Module:
    model = make()
    modiff.apply(model, config or presets.w4a8())
    return model


@pytest.fixture
def anchored(tmp_path: Path) -> Path:
    modiff.save(applied(), tmp_path / "saved", anchor_weights="int8")
    return tmp_path / "saved"


@pytest.mark.parametrize("make", [toy, toy_unet])
@pytest.mark.parametrize("config", [presets.w4a8(), presets.tuned(8, 4)], ids=["w4a8", "tuned"])
def test_a_model_comes_back_with_its_anchor_codes(tmp_path, make, config):
    model, packed = applied(make, config), applied(make, config)
    expected = outputs_of(model)
    modiff.save(model, tmp_path / "saved", anchor_weights="int8")
    assert_equal(outputs_of(model), expected)
    modiff.pack(packed, anchor_weights="int8")
    modiff.save(packed, tmp_path / "packed")
    loaded = modiff.load(tmp_path / "saved", into=make(seed=1))
    assert_equal(outputs_of(loaded), outputs_of(packed))
    modiff.save(loaded, tmp_path / "again")
    written = load_file(tmp_path / "saved" / WEIGHTS)
    for other in ("packed", "again"):
        tensors = load_file(tmp_path / other / WEIGHTS)
        assert tensors.keys() == written.keys()
        for name, tensor in written.items():
            assert_same_bits(tensors[name], tensor)
        assert (tmp_path / other / "config.json").read_bytes() == (tmp_path / "saved" / "config.json").read_bytes()


def test_the_files_hold_int8_codes_and_float32_scales_for_each_layer(anchored):
    tensors = load_file(anchored / WEIGHTS)
    for name in TAKEN:
        assert tensors[f"{name}.weight_error"].dtype == torch.int8
        assert tensors[f"{name}.weight_error"].shape == toy().get_parameter(f"{name}.weight").shape
        assert tensors[f"{name}.weight_error_scale"].dtype == torch.float32


def test_without_being_asked_nothing_is_written(saved):
    assert not any("error" in name for name in load_file(saved / WEIGHTS))


def test_what_cannot_be_kept_is_refused_and_no_folder_appears(tmp_path):
    packed, paper = applied(), applied(config=presets.published(4, 8))
    modiff.pack(packed)
    for model, error, message in (
        (packed, StateError, "body: expected a float weight, got a packed one without anchor codes"),
        (paper, ConfigError, "save.anchor_weights: expected 'quantized' for Toy, got 'int8'"),
    ):
        with pytest.raises(error, match=message):
            modiff.save(model, tmp_path / "saved", anchor_weights="int8")
    assert list(tmp_path.iterdir()) == []


def of_body(config: dict, value: object) -> None:
    entry(config)["layers"]["body"]["anchor_weights"] = value


DAMAGES = {
    "codes not named": (
        lambda f: edit_config(f, lambda c: of_body(c, "quantized")),
        "expected 35 tensors, got an unknown body.weight_error",
    ),
    "unknown kind": (lambda f: edit_config(f, lambda c: of_body(c, 8)), "expected 'quantized' or 'int8'.* body, got 8"),
    "a list": (lambda f: edit_config(f, lambda c: of_body(c, [])), r"expected 'quantized' or 'int8'.* body, got \[\]"),
    "of no use": (
        lambda f: edit_config(
            f, lambda c: entry(c)["layer_configs"][0]["modulation"].update(anchor_weights="quantized")
        ),
        "expected no anchor codes for .*, as its config has no use for them, got int8",
    ),
    "plain layer": (
        lambda f: edit_config(f, lambda c: entry(c)["layer_configs"][0].update(modulation=None)),
        "expected no anchor codes for ",
    ),
    "no codes": (lambda f: edit_weights(f, lambda t: t.pop(BOTH[0])), "got no body.weight_error"),
    "no scale": (lambda f: edit_weights(f, lambda t: t.pop(BOTH[1])), "got no body.weight_error_scale"),
    "neither": (lambda f: edit_weights(f, lambda t: [t.pop(name) for name in BOTH]), "got no body.weight_error"),
    "float codes": (
        lambda f: edit_weights(f, lambda t: t.update({BOTH[0]: t[BOTH[0]].float()})),
        "expected body.weight_error of shape .* in torch.int8, got .* in torch.float32",
    ),
    "nibbles": (
        lambda f: edit_weights(f, lambda t: t.update({BOTH[0]: t["body.weight"].clone()})),
        r"expected body.weight_error of shape \(16, 16, 3, 3\) in torch.int8, got \(16, 72\) in torch.uint8",
    ),
    "half scales": (
        lambda f: edit_weights(f, lambda t: t.update({BOTH[1]: t[BOTH[1]].half()})),
        r"body.weight_error_scale of shape \(16, 1\) in torch.float32, got \(16, 1\) in torch.float16",
    ),
    "two segments": (
        lambda f: edit_weights(f, lambda t: t.update({BOTH[1]: t[BOTH[1]].repeat(1, 2)})),
        r"body.weight_error_scale of shape \(16, 1\) in torch.float32, got \(16, 2\)",
    ),
    "nan scale": (
        lambda f: edit_weights(f, lambda t: t[BOTH[1]].fill_(float("nan"))),
        "positive scales in body.weight_error, got others",
    ),
    "negative scale": (lambda f: edit_weights(f, lambda t: t[BOTH[1]].neg_()), "positive scales in body.weight_error"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_anchor_codes_get_one_line_and_change_nothing(anchored, damage):
    change, message = DAMAGES[damage]
    change(anchored)
    model, plain = toy(1), toy(1)
    modules = dict(model.named_modules())
    with pytest.raises(FormatError, match=message) as caught:
        modiff.load(anchored, into=model)
    assert "\n" not in str(caught.value)
    assert dict(model.named_modules()) == modules
    for ours, theirs in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        assert_same_bits(ours, theirs)


def test_settings_of_the_first_edition_anchor_with_quantized_weights_all_layers_at_once():
    values = Layout.of(applied()).to_dict()
    for loop in (values["config"]["layer"]["modulation"], values["layer_configs"][0]["modulation"]):
        del loop["anchor_weights"], loop["stagger"]
    layout = Layout.from_dict("here", values)
    for layer in (layout.config.layer, layout.layers["body"].config):
        assert (layer.modulation.anchor_weights, layer.modulation.stagger) == ("quantized", False)
