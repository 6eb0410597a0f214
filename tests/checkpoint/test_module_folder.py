"""Torch modules to a folder and back: the same codes and output bits, packed or not, with anchor codes or without."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import modiff
from modiff import CalibrationError, ConfigError, FormatError, StateError, presets
from modiff.config import LayerConfig, ModiffConfig, QuantizerConfig, WeightConfig
from modiff.files import bytes_of
from modiff.model.calibrate import quantizers_of
from tests.helpers import assert_same_bits, assert_same_tensors
from tests.model.toys import TAKEN, sample, toy, toy_unet
from tests.recipes import quantized_anchors

WEIGHTS = "model.safetensors"
STATIC = LayerConfig(weight=WeightConfig(bits=4), activation=QuantizerConfig(bits=8, dynamic=False))
MIXED = ModiffConfig(
    layer=LayerConfig(weight=WeightConfig(bits=3), activation=QuantizerConfig(bits=4), rotation="hadamard"),
    overrides=(
        ("*conv1", LayerConfig(weight=WeightConfig(bits=8))),
        ("body", LayerConfig(weight=WeightConfig(bits=None), rotation="hadamard")),
        ("*to_k", LayerConfig(activation=QuantizerConfig(bits=None))),
    ),
)


def outputs_of(model: nn.Module) -> list[Tensor]:
    with modiff.trajectory(model):
        return sample(model)


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert_same_bits(a, b)


def assert_same_files(folder, other) -> None:
    assert_same_tensors(load_file(other / WEIGHTS), load_file(folder / WEIGHTS))
    assert (other / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def applied(config: ModiffConfig | None = None, make=toy) -> nn.Module:
    model = make()
    names = [name for name, _ in model.named_modules()]
    config = config or presets.published(4, 8)
    fitting = tuple((p, c) for p, c in config.overrides if any(name.endswith(p.lstrip("*")) for name in names))
    modiff.apply(model, dataclasses.replace(config, overrides=fitting))
    return model


@pytest.mark.parametrize(
    ("make", "config", "packed"),
    [
        (toy, presets.w8a4(), False),
        (toy, presets.w4a8(), True),
        (toy, MIXED, False),
        (toy_unet, presets.tuned(4, 4), False),
        (toy_unet, presets.plain(8, 8), True),
        (toy_unet, MIXED, True),
    ],
)
def test_a_module_comes_back_with_the_same_codes_and_output_bits(tmp_path, make, config, packed):
    model = applied(quantized_anchors(config), make)
    expected = outputs_of(model)
    if packed:
        modiff.pack(model)
    modiff.save(model, tmp_path / "saved")
    assert_equal(outputs_of(model), expected)
    loaded = make(seed=1)
    assert modiff.load(tmp_path / "saved", into=loaded) is loaded
    assert_equal(outputs_of(loaded), expected)
    with pytest.raises(StateError, match="remove: expected float weights"):
        modiff.remove(loaded)
    modiff.save(loaded, tmp_path / "again")
    assert_same_files(tmp_path / "saved", tmp_path / "again")
    if not packed:
        modiff.remove(model)
        assert_same_tensors(model.state_dict(), make().state_dict())


@pytest.mark.parametrize(("make", "config"), [(toy, presets.w4a8()), (toy_unet, presets.tuned(8, 4))])
def test_a_module_comes_back_with_its_anchor_codes(tmp_path, make, config):
    model, packed = applied(config, make), applied(config, make)
    modiff.save(model, tmp_path / "saved", anchor_weights="int8")
    modiff.pack(packed, anchor_weights="int8")
    modiff.save(packed, tmp_path / "packed")
    loaded = modiff.load(tmp_path / "saved", into=make(seed=1))
    assert_equal(outputs_of(loaded), outputs_of(packed))
    modiff.save(loaded, tmp_path / "again")
    assert_same_files(tmp_path / "saved", tmp_path / "packed")
    assert_same_files(tmp_path / "saved", tmp_path / "again")
    tensors = load_file(tmp_path / "saved" / WEIGHTS)
    for name in TAKEN if make is toy else ():
        error = tensors[f"{name}.weight_error"]
        assert (error.dtype, error.shape) == (torch.int8, toy().get_parameter(f"{name}.weight").shape)


@pytest.mark.parametrize(
    ("make", "layer"),
    [
        (toy_unet, STATIC),
        (toy_unet, dataclasses.replace(STATIC, modulation=None)),
        (toy, LayerConfig(activation=QuantizerConfig(dynamic=False, step_groups=0), modulation=None)),
    ],
)
def test_measured_scales_come_back_and_unmeasured_ones_are_still_missing(tmp_path, make, layer):
    model = applied(quantized_anchors(ModiffConfig(layer=layer)), make)
    modiff.save(model, tmp_path / "before")
    modiff.calibrate(model, lambda: outputs_of(model))
    modiff.save(model, tmp_path / "saved")
    loaded = modiff.load(tmp_path / "saved", into=make(1))
    assert_equal(outputs_of(loaded), outputs_of(model))
    for name, quantizer in quantizers_of(loaded).items():
        assert_same_tensors(quantizer.state_dict_tensors(), quantizers_of(model)[name].state_dict_tensors())
        assert quantizer.state_dict_tensors()
    with pytest.raises(CalibrationError, match=r"modiff\.calibrate"):
        outputs_of(modiff.load(tmp_path / "before", into=make(1)))


def test_large_weights_go_to_several_files(tmp_path):
    model = applied(make=toy_unet)
    modiff.save(model, tmp_path / "saved", max_shard_size="4KB")
    shards = sorted((tmp_path / "saved").glob("model-*.safetensors"))
    assert len(shards) > 3
    assert all(sum(t.nbytes for t in load_file(shard).values()) <= 4000 for shard in shards)
    assert_equal(outputs_of(modiff.load(tmp_path / "saved", into=toy_unet(1))), outputs_of(model))
    shards[1].unlink()
    with pytest.raises(FormatError, match="A shard is missing"):
        modiff.load(tmp_path / "saved", into=toy_unet(1))


@pytest.mark.parametrize("size", [0, -1, True, "", "5", "5TB", "GB", None, 1.5, "1.GB"])
def test_sizes_are_bytes_or_what_people_write_and_nothing_else(size):
    sizes = {7: 7, "7KB": 7_000, "5 gb": 5 * 10**9, "20MB": 20 * 10**6, "1.5GiB": 3 * 2**29}
    assert [bytes_of(text) for text in sizes] == [*sizes.values()]
    with pytest.raises(ConfigError, match="max_shard_size: expected bytes or a text such as '200MB'"):
        bytes_of(size)


def test_a_module_on_the_meta_device_is_filled(saved):
    with torch.device("meta"):
        empty = type(toy())()
    loaded = modiff.load(saved, into=empty.eval())
    assert not any(t.is_meta for t in loaded.state_dict().values())
    assert_equal(outputs_of(loaded), outputs_of(modiff.load(saved, into=toy(1))))


def test_a_half_precision_module_keeps_its_dtype_and_float32_scales(saved):
    loaded = modiff.load(saved, into=toy(1).bfloat16())
    assert loaded.conv_in.weight.dtype == loaded.body.bias.dtype == torch.bfloat16
    assert loaded.body.operator.weight.dtype == torch.uint8
    scale = load_file(saved / WEIGHTS)["body.weight_scale"]
    assert_same_bits(loaded.body.weight_scale, scale)
    assert (scale != scale.bfloat16().float()).any()


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("change", [nn.utils.weight_norm, nn.utils.spectral_norm, parametrizations.weight_norm,
                                    parametrizations.spectral_norm, lambda m: prune.l1_unstructured(m, "weight", 0.4),
                                    lambda m: prune.l1_unstructured(m, "bias", 0.4)])  # fmt: skip
def test_parameters_that_are_made_of_others_are_written_as_they_compute(tmp_path, change):
    model = toy()
    for layer in (model.body, model.attention.to_q):
        change(layer)
    modiff.apply(model.eval(), presets.published(4, 8))
    modiff.save(model, tmp_path / "saved")
    assert_equal(outputs_of(modiff.load(tmp_path / "saved", into=toy(1))), outputs_of(model))


def test_tied_weights_are_written_for_each_layer(tmp_path):
    model = toy()
    model.attention.to_k.weight = model.attention.to_q.weight
    floats = (("*to_?", LayerConfig(weight=WeightConfig(bits=None))),)
    modiff.apply(model, dataclasses.replace(presets.published(8, 8), overrides=floats))
    modiff.save(model, tmp_path / "saved")
    assert_equal(outputs_of(modiff.load(tmp_path / "saved", into=toy(1))), outputs_of(model))
