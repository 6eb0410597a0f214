"""Pipelines to folders and back by modiff's verbs and by diffusers' own, bit for bit; what is damaged is one line."""

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from safetensors.torch import load_file, save_file

import modiff
from modiff import ConfigError, FormatError, ModiffConfig, presets
from modiff.hosts.diffusers.load import load_pipeline
from modiff.hosts.diffusers.quantizer import align
from modiff.model.attach import attachment_of
from tests.helpers import assert_same_bits, assert_same_tensors
from tests.hosts.tiny import HOSTS, SMALL, TinyHost
from tests.recipes import quantized_anchors

FILE = "diffusion_pytorch_model.safetensors"
SETTINGS = {
    "flux": presets.tuned(4, 4),
    "sdxl": presets.w8a4(),
    "dit": presets.plain(8, 8),
    "ddpm": presets.modulated(None, 8),
    "wan": presets.tuned(3, 3),
}


def applied(host: TinyHost = SMALL, config: ModiffConfig | None = None) -> DiffusionPipeline:
    pipe = host.build()
    modiff.apply(pipe, quantized_anchors(config or SETTINGS.get(host.name, presets.w4a8())))
    return pipe


def natively(folder: Path) -> DiffusionPipeline:
    """By diffusers alone; what modiff has no part in is aligned, as CPU kernels sum in another order otherwise."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module) and attachment_of(component) is None:
            align(component)
    return pipe


def config_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


LOADS = [modiff.load, natively]


@pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)
def test_every_host_comes_back_with_the_same_codes_and_output_bits(host, tmp_path):
    pipe = applied(host)
    before = {name: tensor.clone() for name, tensor in host.network(pipe).state_dict().items()}
    expected = host.call(pipe, steps=2)
    modiff.save(pipe, tmp_path / "saved")
    host.network(pipe).save_pretrained(tmp_path / "applied")  # integers, and the model lives on in floats
    assert_same_tensors(host.network(pipe).state_dict(), before)
    modiff.pack(pipe)
    assert_same_bits(host.call(pipe, steps=2), expected)
    pipe.save_pretrained(tmp_path / "native")
    saved, native = ({f.relative_to(tmp_path / n) for f in (tmp_path / n).rglob("*")} for n in ("saved", "native"))
    assert saved == native
    for other in (modiff.load(tmp_path / "saved"), natively(tmp_path / "native")):
        assert type(other).__name__ == type(host.build()).__name__
        assert_same_tensors(host.network(other).state_dict(), host.network(pipe).state_dict())
        assert_same_bits(host.call(other, steps=2), expected)
    assert config_in(tmp_path / "applied") == config_in(tmp_path / "native" / host.denoiser)
    assert_same_tensors(modiff.load(tmp_path / "applied").state_dict(), host.network(pipe).state_dict())


@pytest.mark.parametrize("load", LOADS)
def test_a_loaded_pipeline_may_be_saved_again_and_copies_save_what_is_in_them(load, tmp_path):
    """The config that diffusers keeps follows its model: a copy's must follow the copy."""
    modiff.save(applied(), tmp_path / "one")
    loaded = load(tmp_path / "one")
    copied = copy.deepcopy(loaded)
    layer = next(iter(attachment_of(copied.unet).layers.values()))
    layer._parameters["weight"].data.fill_(0x11)
    copied.save_pretrained(tmp_path / "two")
    modiff.save(loaded, tmp_path / "three")
    one, two, three = (load_file(tmp_path / name / "unet" / FILE) for name in ("one", "two", "three"))
    assert (two[f"{layer.name}.weight"] == 0x11).all()
    assert_same_tensors(three, one)


def test_anchor_codes_travel_with_the_pipeline(tmp_path):
    pipe, packed = SMALL.build(), SMALL.build()
    for target in (pipe, packed):
        modiff.apply(target, presets.w4a8())
    exact = SMALL.call(pipe)
    modiff.save(pipe, tmp_path / "saved", anchor_weights="int8")
    modiff.save(pipe, tmp_path / "without")
    modiff.pack(packed, anchor_weights="int8")
    modiff.save(packed, tmp_path / "packed")
    expected = SMALL.call(packed)
    for load in LOADS:
        for folder in ("saved", "packed"):
            assert_same_bits(SMALL.call(load(tmp_path / folder)), expected)
    rounded = SMALL.call(modiff.load(tmp_path / "without"))
    assert float((expected - exact).norm()) < 0.1 * float((rounded - exact).norm())


def test_measured_scales_travel_with_the_pipeline_and_are_written_by_the_next_save(tmp_path):
    layer = modiff.LayerConfig(activation=modiff.QuantizerConfig(dynamic=False))
    pipe = applied(config=ModiffConfig(layer=layer, attention=modiff.AttentionConfig()))
    pipe.unet.save_pretrained(tmp_path / "before")
    assert config_in(tmp_path / "before")["quantization_config"]["scales"] == {}
    modiff.calibrate(pipe, lambda: SMALL.call(pipe))
    expected = SMALL.call(pipe)
    pipe.unet.save_pretrained(tmp_path / "unet")
    modiff.save(pipe, tmp_path / "saved")
    assert config_in(tmp_path / "unet") == config_in(tmp_path / "saved" / "unet")
    for load in LOADS:
        assert_same_bits(SMALL.call(load(tmp_path / "saved")), expected)
    half = DiffusionPipeline.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    ours, theirs = (next(iter(attachment_of(p.unet).layers.values())).quantizer for p in (half, pipe))
    assert_same_tensors(ours.state_dict_tensors(), theirs.state_dict_tensors())


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("make", [lambda _: applied(), *LOADS])
def test_an_interrupted_call_leaves_no_trace(make, at, quantized):
    pipe = make(quantized)
    expected, step = SMALL.call(pipe), pipe.scheduler.step
    layers = attachment_of(pipe.unet).layers.values()
    assert not any(layer.loop.tensors() for layer in layers)

    def interrupted(*args: Any, **words: Any) -> Any:
        assert any(layer.loop.tensors() for layer in layers)
        if args[1] == pipe.scheduler.timesteps[at]:
            raise KeyboardInterrupt
        return step(*args, **words)

    pipe.scheduler.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        SMALL.call(pipe)
    pipe.scheduler.step = step
    assert_same_bits(SMALL.call(pipe), expected)


def test_remove_takes_everything_away_again(tmp_path):
    pipe, plain = SMALL.build(), SMALL.build()
    plain.unet.save_pretrained(tmp_path / "plain")  # which leaves entries in the config, too
    modiff.apply(pipe, presets.published(4, 8))
    pipe.unet.save_pretrained(tmp_path / "applied")
    modiff.remove(pipe)
    assert not hasattr(pipe.unet, "hf_quantizer")
    assert pipe.unet.config == plain.unet.config
    pipe.unet.save_pretrained(tmp_path / "removed")
    assert_same_tensors(load_file(tmp_path / "removed" / FILE), plain.unet.state_dict())


def damage(folder: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], object]) -> None:
    config, weights = config_in(folder), load_file(folder / FILE)
    change(config, weights)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / FILE, {"format": "pt"})


NAME = "down_blocks.0.resnets.0.conv1"
ENTRY = "quantization_config"
DAMAGES = {
    "version": (lambda c, _: c[ENTRY].update(version=7), "expected format version 1, got 7"),
    "settings alone": (lambda c, _: c.update({ENTRY: {"quant_method": "modiff", "config": {}}}), "got settings alone"),
    "10^9 weights, never allocated": (lambda c, _: c.update(block_out_channels=[2**12, 2**13]), "expected .* of shape"),
    "scale": (lambda _, w: w[f"{NAME}.weight_scale"].zero_(), f"positive scales in {NAME}"),
}


@pytest.mark.parametrize(("change", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_or_hostile_folder_gets_one_line_by_either_way(quantized, tmp_path, change, message):
    folder = shutil.copytree(quantized, tmp_path / "copy")
    unet = folder / "unet"
    damage(unet, change)
    for load, path in ((modiff.load, folder), (modiff.load, unet), (UNet2DModel.from_pretrained, unet)):
        with pytest.raises(FormatError, match=message) as caught:
            load(path)
        assert "\n" not in str(caught.value)


def test_a_folder_of_another_kind_is_not_ours_to_load(floats, quantized, tmp_path):
    unet = shutil.copytree(floats / "unet", tmp_path / "unet")
    damage(unet, lambda config, _: config.update(_class_name="os", quantization_config={}))
    for folder, message in {
        floats / "unet": "expected a quantization_config, got none",
        floats: "expected a quantized pipeline, got a plain DDIMPipeline",
        unet: "expected a model of diffusers, got _class_name 'os'",
    }.items():
        with pytest.raises(FormatError, match=message):
            modiff.load(folder)
    with pytest.raises(ConfigError, match=r"load: expected no into= for .*Use modiff\.load\(folder\)"):
        modiff.load(quantized, into=SMALL.build().unet)


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize("variant", [None, "fp16", "ema"])
def test_every_layout_that_diffusers_writes_is_read_floats_and_quantized_in_float32(tmp_path, variant, shard):
    pipe = HOSTS["sd"].build().to(torch.float16)
    pipe.save_pretrained(tmp_path / "half", variant=variant, max_shard_size=shard)
    shutil.rmtree(tmp_path / "half" / "unet")  # a variant of some components
    pipe.unet.save_pretrained(tmp_path / "half" / "unet", max_shard_size=shard)
    for other in ("sd_xl_base_1.0.safetensors", "lora.fp16.safetensors", "pytorch_model.bin"):
        (tmp_path / "half" / other).write_bytes(b"none of the pipeline's")
    loaded = load_pipeline(tmp_path / "half")
    for name in ("unet", "text_encoder", "vae"):
        assert_same_tensors(getattr(loaded, name).state_dict(), getattr(pipe, name).float().state_dict())
    modiff.apply(pipe, "w4a8")
    pipe.save_pretrained(tmp_path / "saved", variant=variant, max_shard_size=shard)
    modiff.save(pipe, tmp_path / "expected")
    expected = modiff.load(tmp_path / "expected").unet.state_dict()
    for unet in (modiff.load(tmp_path / "saved").unet, modiff.load(tmp_path / "saved" / "unet")):
        assert_same_tensors(unet.state_dict(), expected)


WEIGHTS = Path("unet") / FILE
NOT_PART = "expected part of a diffusers pipeline"


def changed(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    return lambda folder: damage(folder / "unet", lambda _, weights: change(weights))


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "unet" / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()


BROKEN = [
    (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-100]), f"{WEIGHTS}: expected a safetensors file"),
    (pickled, f"{WEIGHTS.with_suffix('.bin')}: expected safetensors, got a pickle"),
    (changed(lambda w: w.pop("conv_in.weight")), "weights for every parameter, got none for conv_in.weight (1 in all)"),
    (changed(lambda w: w["conv_out.bias"].fill_(torch.nan)), "finite weights, got NaN or infinity in conv_out.bias"),
    (lambda f: (f / "model_index.json").unlink(), "expected a diffusers folder, got one without model_index"),
    (lambda f: (f / "model_index.json").write_bytes(b"[]"), f"model_index.json: {NOT_PART}"),
    (lambda f: (f / "unet/config.json").write_bytes(b"{"), f"unet: {NOT_PART}"),
]


@pytest.mark.parametrize(("breaks", "message"), BROKEN)
def test_a_damaged_folder_of_floats_is_one_clear_error(floats, tmp_path, breaks, message):
    breaks(folder := shutil.copytree(floats, tmp_path / "pipeline"))
    with pytest.raises(FormatError, match=re.escape(message)) as caught:
        load_pipeline(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "got"),
    [
        ("absent", "got no such folder"),
        ("./absent/folder", "got no such folder"),
        ("someone/unheard-of-model", "download failed"),
        (__file__, "got a file"),
    ],
)
def test_a_name_that_leads_nowhere_is_one_clear_error(model, got):
    with pytest.raises(FormatError, match=f"{model}: expected .*{got}") as caught:
        load_pipeline(model)
    assert "\n" not in str(caught.value)
