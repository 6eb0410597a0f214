"""Pipelines to folders and back: by modiff's verbs and by diffusers' own, bit for bit on every kind of host."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from safetensors.torch import load_file, save_file

import modiff
from modiff import ConfigError, FormatError, ModiffDiffusersConfig, StateError, presets
from modiff.hosts.diffusers.load import load_pipeline
from modiff.hosts.diffusers.quantizer import align
from modiff.model.attach import attachment_of
from tests.helpers import assert_same_bits
from tests.hosts.tiny import HOSTS, TinyHost, pixels
from tests.pixels import pixel_pipeline, saved_pipeline
from tests.recipes import quantized_anchors

SETTINGS = {"flux": presets.tuned(4, 4), "sdxl": presets.w8a4(), "dit": presets.plain(8, 8), "wan": presets.tuned(3, 3)}


class Small(TinyHost):
    def call(self, pipe: DiffusionPipeline, steps: int = 3) -> torch.Tensor:
        return super().call(pipe, steps, batch=2)


SMALL = Small(name="small", build=pixel_pipeline, settings=pixels, denoiser="unet")
call_small = SMALL.call


def modulated(host: TinyHost) -> tuple[TinyHost, DiffusionPipeline]:
    pipe = host.build()
    modiff.apply(pipe, quantized_anchors(SETTINGS.get(host.name, presets.w4a8())))
    return host, pipe


def natively(folder: Path) -> DiffusionPipeline:
    """By diffusers alone; components that modiff has no part in are copied off the file as in `tiny.reload`."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module) and attachment_of(component) is None:
            align(component)
    return pipe


def denoiser(host: TinyHost, pipe: DiffusionPipeline) -> torch.nn.Module:
    return getattr(pipe, host.denoiser)


@pytest.mark.parametrize("name", HOSTS)
def test_every_host_comes_back_with_the_same_codes_and_output_bits(name, tmp_path):
    host, pipe = modulated(HOSTS[name])
    expected = host.call(pipe, steps=2)
    modiff.save(pipe, tmp_path / "saved")
    modiff.pack(pipe)
    assert_same_bits(host.call(pipe, steps=2), expected)
    pipe.save_pretrained(tmp_path / "native")
    files = sorted(p.relative_to(tmp_path / "saved") for p in (tmp_path / "saved").rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path / "native") for p in (tmp_path / "native").rglob("*") if p.is_file())
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".pkl", ".ckpt")]
    state = denoiser(host, pipe).state_dict()
    for other in (modiff.load(tmp_path / "saved"), natively(tmp_path / "native")):
        assert type(other).__name__ == type(HOSTS[name].build()).__name__
        for key, tensor in denoiser(host, other).state_dict().items():
            assert_same_bits(tensor, state[key])
        assert_same_bits(host.call(other, steps=2), expected)


def test_a_loaded_pipeline_may_be_copied_saved_and_loaded_again(tmp_path):
    host, pipe = modulated(SMALL)
    expected = host.call(pipe)
    modiff.save(pipe, tmp_path / "one")
    for i, load in enumerate((modiff.load, natively)):
        loaded = copy.deepcopy(load(tmp_path / "one"))
        assert_same_bits(host.call(loaded), expected)
        folder = tmp_path / f"again{i}"
        (loaded.save_pretrained if i else lambda f, p=loaded: modiff.save(p, f))(folder)
        assert_same_bits(host.call(natively(folder)), expected)


def test_two_copies_of_a_loaded_pipeline_save_what_is_their_own(tmp_path):
    """The config that diffusers keeps follows its model: a copy's must follow the copy."""
    host, pipe = modulated(SMALL)
    modiff.save(pipe, tmp_path / "one")
    loaded = natively(tmp_path / "one")
    copied = copy.deepcopy(loaded)
    layer = next(iter(attachment_of(copied.unet).layers.values()))
    layer.weight.data.fill_(0x11)
    copied.save_pretrained(tmp_path / "two")
    loaded.save_pretrained(tmp_path / "three")
    key = f"{layer.name}.weight"
    file = Path("unet/diffusion_pytorch_model.safetensors")
    before = load_file(tmp_path / "one" / file)[key]
    assert (load_file(tmp_path / "two" / file)[key] == 0x11).all()
    assert_same_bits(load_file(tmp_path / "three" / file)[key], before)
    assert host.calls_per_step == 1


def test_a_model_alone_goes_to_a_folder_and_back(tmp_path):
    host, pipe = modulated(SMALL)
    expected = host.call(pipe)
    modiff.save(pipe.unet, tmp_path / "unet")
    config = json.loads((tmp_path / "unet" / "config.json").read_text())
    assert config["_class_name"] == "UNet2DModel"
    assert config["quantization_config"]["quant_method"] == "modiff"
    assert not attachment_of(pipe.unet).packed
    for unet in (modiff.load(tmp_path / "unet"), UNet2DModel.from_pretrained(tmp_path / "unet")):
        plain = host.build()
        plain.unet = unet
        assert_same_bits(host.call(plain), expected)
        assert not unet.training
    with pytest.raises(ConfigError, match=r"load: expected no into= for .*Use modiff\.load\(folder\)"):
        modiff.load(tmp_path / "unet", into=unet)
    modiff.save(pipe, tmp_path / "pipeline")
    with pytest.raises(ConfigError, match=r"load: expected no into= for .*Use modiff\.load\(folder\)"):
        modiff.load(tmp_path / "pipeline", into=unet)


@pytest.mark.parametrize("name", ["ddim", "flux"])
def test_anchor_codes_travel_with_the_pipeline(tmp_path, name):
    host = HOSTS[name]
    pipe, packed = host.build(), host.build()
    for target in (pipe, packed):
        modiff.apply(target, presets.w4a8())
    exact = host.call(pipe, steps=2)
    modiff.save(pipe, tmp_path / "saved", anchor_weights="int8")
    modiff.save(pipe, tmp_path / "without")
    modiff.pack(packed, anchor_weights="int8")
    modiff.save(packed, tmp_path / "packed")
    expected = host.call(packed, steps=2)
    for load in (modiff.load, natively):
        for folder in ("saved", "packed"):
            assert_same_bits(host.call(load(tmp_path / folder), steps=2), expected)
    rounded = host.call(modiff.load(tmp_path / "without"), steps=2)
    assert float((expected - exact).norm()) < 0.1 * float((rounded - exact).norm())
    assert "int8 anchor codes" in str(attachment_of(denoiser(host, natively(tmp_path / "saved"))).report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_pretrained_keeps_anchor_codes_when_asked_and_reads_them_in_any_dtype(tmp_path, dtype):
    SMALL.build().unet.save_pretrained(tmp_path / "plain")
    config = ModiffDiffusersConfig(presets.w4a8(), anchor_weights="int8")
    model = UNet2DModel.from_pretrained(tmp_path / "plain", quantization_config=config)
    model.save_pretrained(tmp_path / "packed")
    written = load_file(tmp_path / "packed" / "diffusion_pytorch_model.safetensors")
    again = UNet2DModel.from_pretrained(tmp_path / "packed", dtype=dtype).state_dict()
    errors = [key for key in written if "weight_error" in key]
    assert len(errors) == 2 * len(attachment_of(model).layers)
    for key in errors:
        assert_same_bits(again[key], written[key])


def test_measured_scales_travel_with_the_pipeline(tmp_path):
    host = SMALL
    pipe = host.build()
    config = modiff.ModiffConfig(
        layer=modiff.LayerConfig(activation=modiff.QuantizerConfig(dynamic=False)), attention=modiff.AttentionConfig()
    )
    modiff.apply(pipe, quantized_anchors(config))
    modiff.calibrate(pipe, lambda: host.call(pipe))
    expected = host.call(pipe)
    modiff.save(pipe, tmp_path / "saved")
    for load in (modiff.load, natively):
        assert_same_bits(host.call(load(tmp_path / "saved")), expected)
    half = DiffusionPipeline.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    ours, theirs = (next(iter(attachment_of(p.unet).layers.values())).quantizer for p in (half, pipe))
    for (name, tensor), (other, expected) in zip(
        sorted(ours.state_dict_tensors().items()), sorted(theirs.state_dict_tensors().items()), strict=True
    ):
        assert name == other
        assert_same_bits(tensor, expected)


def test_large_networks_go_to_shards(tmp_path):
    host, pipe = modulated(SMALL)
    expected = host.call(pipe)
    modiff.save(pipe, tmp_path / "one", max_shard_size="8KB")
    modiff.pack(pipe)
    pipe.save_pretrained(tmp_path / "two", max_shard_size="8KB")
    for folder in (tmp_path / "one", tmp_path / "two"):
        assert len(list((folder / "unet").glob("*-of-*.safetensors"))) > 2
        assert_same_bits(host.call(modiff.load(folder)), expected)
        assert_same_bits(host.call(natively(folder)), expected)


def test_the_state_of_a_loaded_pipeline_ends_with_each_call(tmp_path):
    host, pipe = modulated(SMALL)
    modiff.save(pipe, tmp_path / "saved")
    for loaded in (modiff.load(tmp_path / "saved"), natively(tmp_path / "saved")):
        expected = host.call(loaded, steps=3)
        attachment = attachment_of(loaded.unet)
        assert not attachment.clock.active
        assert not any(quantized.loop.tensors() for quantized in attachment.layers.values())

        def broken(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        step, loaded.scheduler.step = loaded.scheduler.step, broken
        with pytest.raises(KeyboardInterrupt):
            host.call(loaded, steps=3)
        loaded.scheduler.step = step
        assert_same_bits(host.call(loaded, steps=3), expected)
        with modiff.trajectory(loaded):
            assert attachment.clock.active
        assert_same_bits(host.call(loaded, steps=1), host.call(loaded, steps=1))


def test_guidance_in_two_calls_keeps_two_states_natively(tmp_path):
    host, pipe = modulated(HOSTS["flux"])
    modiff.save(pipe, tmp_path / "saved")
    native = natively(tmp_path / "saved")
    seen = []
    layer = next(iter(attachment_of(native.transformer).layers.values()))
    layer.register_forward_hook(lambda *_: seen.append(set(layer.loop.memories)))
    host.call(native)
    assert max(map(len, seen)) == 2
    assert {context for context, _ in seen[-1]} == {"cond", "uncond"}


def test_verbs_know_what_a_loaded_pipeline_cannot(tmp_path):
    _, pipe = modulated(SMALL)
    modiff.save(pipe, tmp_path / "saved")
    loaded = modiff.load(tmp_path / "saved")
    with pytest.raises(
        StateError, match="remove: expected float weights to put back, got UNet2DModel with packed ones"
    ):
        modiff.remove(loaded)
    with pytest.raises(StateError, match="apply: expected a plain model"):
        modiff.apply(loaded, presets.w8a8())
    modiff.pack(loaded)


def test_a_plain_pipeline_is_not_saved_and_a_full_folder_not_overwritten(tmp_path):
    host, pipe = modulated(SMALL)
    with pytest.raises(StateError, match="save: expected a model with modulated layers"):
        modiff.save(host.build(), tmp_path / "saved")
    modiff.save(pipe, tmp_path / "saved")
    with pytest.raises(FormatError, match="saved: expected a new or an empty folder, got files in it"):
        modiff.save(pipe, tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


# ------------------------------------------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine") / "saved"
    modiff.save(modulated(SMALL)[1], folder)
    return folder


def entry_of(folder: Path) -> tuple[Path, dict]:
    path = folder / "unet" / "config.json"
    return path, json.loads(path.read_text())


def rewrite(folder: Path, **changes: object) -> None:
    path, config = entry_of(folder)
    config["quantization_config"].update(changes)
    path.write_text(json.dumps(config))


def retensor(folder: Path, change) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def wide(folder: Path, channels: int = 2**12) -> None:
    """A network of 10^9 weights: it must never be allocated."""
    path, config = entry_of(folder)
    config["block_out_channels"] = [channels, 2 * channels]
    path.write_text(json.dumps(config))


def bare(folder: Path) -> None:
    path, config = entry_of(folder)
    config["quantization_config"] = {"quant_method": "modiff", "config": {}}
    path.write_text(json.dumps(config))


NAME = "down_blocks.0.resnets.0.conv1"
DAMAGES = {
    "version": (lambda f: rewrite(f, version=7), "expected format version 1, got 7"),
    "settings alone": (bare, "expected the layers of a quantized model, got settings alone"),
    "layers": (lambda f: rewrite(f, layers={NAME: {"config": 5}}), "expected the number of one of 1 layer configs"),
    "unknown layer": (lambda f: rewrite(f, layers={"nowhere": {"config": 0}}), "got no such module"),
    "wide": (wide, "expected .* of shape"),
    "missing": (lambda f: retensor(f, lambda t: t.pop(f"{NAME}.weight_scale")), f"got no {NAME}.weight_scale"),
    "missing float": (lambda f: retensor(f, lambda t: t.pop("conv_in.bias")), "got no conv_in.bias"),
    "extra": (lambda f: retensor(f, lambda t: t.update(more=torch.ones(1))), "got an unknown more"),
    "dtype": (
        lambda f: retensor(f, lambda t: t.update({f"{NAME}.weight": t[f"{NAME}.weight"].float()})),
        "in torch.uint8, got .* in torch.float32",
    ),
    "shape": (
        lambda f: retensor(f, lambda t: t.update({f"{NAME}.weight": t[f"{NAME}.weight"][:4].clone()})),
        f"expected {NAME}.weight of shape",
    ),
    "scale": (
        lambda f: retensor(f, lambda t: t[f"{NAME}.weight_scale"].zero_()),
        f"positive scales in {NAME}",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_hostile_folder_gets_one_line_by_either_way(pristine, tmp_path, damage):
    folder = tmp_path / "copy"
    shutil.copytree(pristine, folder)
    change, message = DAMAGES[damage]
    change(folder)
    for load in (
        lambda: modiff.load(folder),
        lambda: load_pipeline(folder),
        lambda: modiff.load(folder / "unet"),
        lambda: UNet2DModel.from_pretrained(folder / "unet"),
    ):
        with pytest.raises(FormatError, match=message) as caught:
            load()
        assert "\n" not in str(caught.value)


def test_a_network_too_large_for_any_machine_gets_one_line(pristine, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(pristine, folder)
    wide(folder, 2**20)
    with pytest.raises(FormatError, match=r"unet: expected part of a diffusers pipeline, got .*memory") as caught:
        modiff.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_a_cut_file_gets_one_line(pristine, tmp_path, length):
    folder = tmp_path / "copy"
    shutil.copytree(pristine, folder)
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    for target in (folder, folder / "unet"):
        with pytest.raises(FormatError, match="damaged or was cut while copied") as caught:
            modiff.load(target)
        assert "\n" not in str(caught.value)


def test_a_model_of_diffusers_that_is_not_quantized_is_not_ours_to_load(tmp_path):
    pixel_pipeline().unet.save_pretrained(tmp_path)
    with pytest.raises(FormatError, match="expected a quantization_config, got none"):
        modiff.load(tmp_path)
    with pytest.raises(FormatError, match="expected a quantized pipeline, got a plain DDIMPipeline"):
        modiff.load(saved_pipeline(tmp_path / "pipe"))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "_class_name": "os", "quantization_config": {}}))
    with pytest.raises(FormatError, match="expected a model of diffusers, got _class_name 'os'"):
        modiff.load(tmp_path)
