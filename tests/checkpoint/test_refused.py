"""What a folder says is looked at before it is believed: layouts, headers and whole folders, damaged or hostile."""

import copy
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import modiff
from modiff import AttentionConfig, ConfigError, FormatError, LayerConfig, StateError, WeightConfig, presets
from modiff.checkpoint.layout import Layer, Layout
from modiff.checkpoint.tensors import read_headers, weight_files
from modiff.errors import PathError
from tests.checkpoint.test_module_folder import WEIGHTS, applied, assert_equal
from tests.helpers import assert_same_tensors
from tests.model.toys import sample, toy, toy_unet
from tests.strategies import layer_configs, model_configs

SMALL = Layout(
    presets.w4a8(),
    {"a": Layer(LayerConfig()), "b": Layer(LayerConfig(weight=WeightConfig(bits=4)), 3), "c": Layer(LayerConfig())},
    {"a": ("static.0.scale",)},
)


def reread(layout: Layout) -> Layout:
    return Layout.from_dict("here", json.loads(json.dumps(layout.to_dict())))


@settings(max_examples=15)
@given(model_configs(), st.lists(layer_configs(), max_size=3), st.integers(1, 9))
def test_any_layout_comes_back_from_json(config, layers, split):
    cut = config.split_shortcuts == "auto"
    named = {f"layer{i}": Layer(layer, split if i % 2 and cut else None) for i, layer in enumerate(layers * 2)}
    layout = Layout(config, named, {name: ("x", "y") for name in named})
    assert reread(layout) == layout


def with_value(*path: str | int, value: object) -> dict[str, object]:
    values = copy.deepcopy(SMALL.to_dict())
    at = values
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, "expected an object quantization_config, got NoneType"),
        (with_value("quant_method", value="bitsandbytes"), "expected quant_method 'modiff', got 'bitsandbytes'"),
        (with_value("version", value=2), "expected format version 1, got 2 written by 'modiff .*Quantize the mod"),
        (
            {key: value for key, value in SMALL.to_dict().items() if key != "config"},
            "expected the field, got no config",
        ),
        (with_value("config", "min_weights", value="many"), "expected the settings of modiff, got: ModiffConfig.min"),
        (with_value("layer_configs", value=None), "expected the settings of modiff, got: LayerConfig"),
        (with_value("layers", value=[]), "expected an object layers, got list"),
        (with_value("layers", "a", value=0), r"expected an object layers\.a, got int"),
        (with_value("layers", "a", "config", value=2), "expected the number of one of 2 layer configs for a, got 2"),
        (with_value("layers", "a", "config", value=True), ".*layer configs for a, got True"),
        (with_value("layers", "b", "split", value=2.5), "expected a channel to split b at, got 2.5"),
        (with_value("config", "split_shortcuts", value="off"), "expected layers that are not split, .* got b split"),
        (with_value("largest_step", value=-1), "expected a difference of timesteps as largest_step, got -1"),
        (with_value("scales", "a", value=[1]), r"expected names of scales for a, got \[1\]"),
    ],
)
def test_a_damaged_layout_gets_one_line(values, message):
    with pytest.raises(FormatError, match=f"^here: {message}") as caught:
        Layout.from_dict("here", values)
    assert "\n" not in str(caught.value)


TENSORS = {"a": torch.zeros(2, 3), "b": torch.ones(4, dtype=torch.int8)}


def raw(path: Path, header: object, data: bytes = b"", claimed: int | None = None) -> Path:
    """A file with this header, whatever it claims."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if claimed is None else claimed) + text + data)
    return path


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "data", "claimed"),
    [
        (b"", b"", 0),
        (b"{}", b"", 2**64 - 1),
        (b"[" * 50_000, b"", None),
        ({"a": entry(shape=(2**40,), offsets=(0, 2**42))}, b"1234", None),
        ({"a": entry(shape=(2**62, 2**62), offsets=(0, 8))}, bytes(8), None),
        ({"a": entry(offsets=(0, 8)), "b": entry(offsets=(0, 8))}, bytes(8), None),
        ({"a": entry()}, bytes(7), None),
        ({"a": entry(dtype="F99")}, bytes(8), None),
        ({"a": {"dtype": "F32"}}, bytes(8), None),
    ],
)
def test_headers_that_lie_are_refused_before_anything_is_read(tmp_path, header, data, claimed) -> None:
    path = raw(tmp_path / "x.safetensors", header, data, claimed)
    with pytest.raises(FormatError, match=r"x\.safetensors: expected a safetensors file, got .*Copy it again\.$"):
        read_headers([path])


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    for length in range(len(content)):
        (tmp_path / "x.safetensors").write_bytes(content[:length])
        with pytest.raises(FormatError, match="missing or damaged"):
            read_headers([tmp_path / "x.safetensors"])


def test_a_missing_file_a_foreign_dtype_and_a_tensor_twice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"gone\.safetensors: expected a safetensors file, got FileNotFoundError"):
        read_headers([tmp_path / "gone.safetensors"])
    save_file({"a": torch.zeros(2, dtype=torch.float8_e4m3fn)}, tmp_path / "f8.safetensors")
    with pytest.raises(FormatError, match="expected numbers that modiff writes in a, got F8_E4M3"):
        read_headers([tmp_path / "f8.safetensors"])
    for name in ("x", "y"):
        save_file(TENSORS, tmp_path / f"{name}.safetensors")
    with pytest.raises(FormatError, match=r"y.safetensors: expected each tensor once, got a also in x\.safetensors"):
        read_headers([tmp_path / "x.safetensors", tmp_path / "y.safetensors"])


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": []}', "[" * 50_000, '{"weight_map": null}'])
def test_a_damaged_index_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(FormatError, match="expected the index of a sharded checkpoint"):
        weight_files(tmp_path, "model")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/hostname", "sub/m1", "gone", "", ".."])
def test_an_index_points_at_files_next_to_it_only(tmp_path: Path, name: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "m1").write_bytes(b"")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(FormatError, match="expected the names of files next to it"):
        weight_files(tmp_path, "model")


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
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "model.safetensors: expected a safetensors file, got FileNotF"),
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
    "integer floats": (changed("norm.bias", Tensor.int), "norm.bias .* in floating point, got .* torch.int32"),
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
    with pytest.raises(FormatError, match=r"nowhere.config\.json: expected the config of a saved model, got No such"):
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


@pytest.mark.parametrize("where", ["file/below", "/proc/x", "/dev/null/x", "n" * 300])
def test_a_folder_that_cannot_be_written_is_one_line(where, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(PathError, match=r"^[^\n]*: expected a file that can be written, got .*Give another path\.$"):
        modiff.save(applied(), tmp_path / where)
    with pytest.raises(ConfigError, match=r"expected the name of a file or folder, got ''\..*Use a name such as 'out'"):
        modiff.save(applied(), "")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
