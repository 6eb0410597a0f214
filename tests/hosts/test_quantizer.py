"""modiff among diffusers' quantization methods: every trap that an outside quantizer can fall into."""

import json
import subprocess
import sys

import pytest
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig, UNet2DModel, WanTransformer3DModel
from safetensors.torch import load_file, save_file

import modiff
from modiff import ConfigError, LayerConfig, ModiffConfig, ModiffDiffusersConfig, WeightConfig, presets
from modiff.model.attach import attachment_of
from tests.helpers import assert_same_bits, assert_same_tensors, relative_error
from tests.hosts.tiny import HOSTS, SMALL

FILE = "diffusion_pytorch_model.safetensors"
W4A8 = ModiffDiffusersConfig(presets.w4a8())


def packed(config: ModiffConfig, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    pipe = SMALL.build().to(dtype)
    modiff.apply(pipe, config)
    modiff.pack(pipe)
    return pipe


@pytest.mark.parametrize("config", [ModiffDiffusersConfig(), ModiffDiffusersConfig(presets.tuned(4, 3), ["conv2"])])
def test_a_config_is_json_and_comes_back(config):
    """Trap 1: diffusers evaluates repr() and to_diff_dict(), which its own base class does not have."""
    values = json.loads(json.dumps(config.to_dict()))
    again = ModiffDiffusersConfig.from_dict(values)
    assert again == config
    assert again.config == config.config
    assert again.chosen == config.chosen
    assert dict(config) == json.loads(config.to_json_string(use_diff=False)) == values
    assert json.loads(config.to_json_string()) == config.to_diff_dict()
    assert repr(config).startswith("ModiffDiffusersConfig(ModiffConfig(")
    assert ModiffDiffusersConfig.from_dict(values, return_unused_kwargs=True, more=1) == (config, {"more": 1})
    assert ModiffDiffusersConfig(config.config.to_dict()).config == config.config
    with pytest.raises(ConfigError, match=r"config: expected a ModiffConfig, .* got 4"):
        ModiffDiffusersConfig(4)


PROBE = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
from diffusers import UNet2DModel
from diffusers.quantizers import auto
def show():
    print(*("modiff" in table for table in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)))
import modiff, modiff.hosts
modiff.apply(torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(3))))
show()
from modiff import ModiffDiffusersConfig
show()
print(type(UNet2DModel.from_pretrained(sys.argv[1]).hf_quantizer).__name__)
"""


def test_the_tables_of_diffusers_change_with_one_name_of_modiff(quantized):
    """Trap 8: diffusers has no plugins; something of modiff must be imported."""
    probe = [sys.executable, "-c", PROBE, str(quantized / "unet")]
    done = subprocess.run(probe, capture_output=True, text=True, check=True, timeout=170)
    assert done.stdout.splitlines() == ["False False", "True True", "ModiffQuantizer"]


SOME = ModiffConfig(layer=LayerConfig(weight=WeightConfig(bits=None)), overrides=(("*conv1", LayerConfig()),))


@pytest.mark.parametrize(("config", "left"), [("w8a8", ["conv2", "mid_block"]), (presets.tuned(4, 4), []), (SOME, [])])
def test_on_the_fly_gives_the_bits_of_apply_and_pack(floats, config, left):
    """Trap 4: keys that the empty model does not have are skipped without a word, so layers are swapped in place."""
    config = ModiffDiffusersConfig(config, modules_to_not_convert=left)
    unet, info = UNet2DModel.from_pretrained(floats / "unet", quantization_config=config, output_loading_info=True)
    assert not any(info.values())
    assert not any(part in name for name in attachment_of(unet).layers for part in left)
    pipe = packed(config.chosen)
    assert_same_tensors(unet.state_dict(), pipe.unet.state_dict())
    assert_same_bits(SMALL.call(SMALL.around(unet)), SMALL.call(pipe))


def test_on_the_fly_for_a_pipeline_by_component(floats, tmp_path):
    mapping = PipelineQuantizationConfig(quant_mapping={"unet": W4A8})
    pipe = DiffusionPipeline.from_pretrained(floats, quantization_config=mapping)
    pipe.save_pretrained(tmp_path / "saved")
    assert_same_bits(SMALL.call(modiff.load(tmp_path / "saved")), SMALL.call(pipe))


def test_one_config_serves_two_models_and_is_written_by_each_save(floats, tmp_path):
    """Trap 6: diffusers leaves the entry out unless the quantizer registers it."""
    unet, other = (UNet2DModel.from_pretrained(floats / "unet", quantization_config=W4A8) for _ in range(2))
    assert ModiffDiffusersConfig(presets.w4a8()) == W4A8
    assert unet.config.quantization_config is not other.config.quantization_config
    assert unet.config._pre_quantization_dtype is None
    for folder in ("one", "two"):  # diffusers puts the dictionary of the first save into the model's config
        unet.save_pretrained(tmp_path / folder)
        values = json.loads((tmp_path / folder / "config.json").read_text())["quantization_config"]
        assert set(values["layers"]) == set(attachment_of(unet).layers)


def test_scales_are_not_rounded_to_the_dtype_of_the_model(floats, quantized):
    """Trap 5: floats are cast before the quantizer sees them; a bfloat16 scale is off by up to 0.4 %."""
    exact = {k: v for k, v in load_file(quantized / "unet" / FILE).items() if k.endswith("weight_scale")}
    unet = UNet2DModel.from_pretrained(quantized / "unet", dtype=torch.bfloat16)
    assert_same_tensors({name: unet.state_dict()[name] for name in exact}, exact)
    assert unet.conv_in.weight.dtype == torch.bfloat16
    on_the_fly = UNet2DModel.from_pretrained(floats / "unet", dtype=torch.bfloat16, quantization_config=W4A8)
    assert_same_tensors(on_the_fly.state_dict(), packed(presets.w4a8(), torch.bfloat16).unet.state_dict())


def test_modules_that_diffusers_keeps_in_float32_stay_so_and_its_class_is_not_changed(tmp_path):
    """Trap 5: the list of such modules is the class's own; adding to it would change every later model."""
    before, dtypes = list(WanTransformer3DModel._keep_in_fp32_modules), []
    HOSTS["wan"].build().transformer.save_pretrained(tmp_path)
    for config in (None, ModiffDiffusersConfig(presets.w8a8())):
        model = WanTransformer3DModel.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=config)
        dtypes.append({name: parameter.dtype for name, parameter in model.named_parameters()})
    assert all(dtype in (dtypes[0][name], torch.int8) for name, dtype in dtypes[1].items())
    assert dtypes[1]["scale_shift_table"] == torch.float32
    assert WanTransformer3DModel._keep_in_fp32_modules == before


def test_casting_is_refused_and_moving_is_not(quantized):
    """Trap 9."""
    for unet in (UNet2DModel.from_pretrained(quantized / "unet"), packed(presets.w4a8()).unet):
        for cast in (unet.half, unet.float, lambda u=unet: u.to(torch.float16), lambda u=unet: u.to(dtype=torch.half)):
            with pytest.raises(ValueError, match=r"not supported|unsupported"):
                cast()
        with pytest.raises(NotImplementedError, match="dequantize"):
            unet.dequantize()
        assert unet.to("cpu") is unet.to(torch.float32) is unet


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"device_map": {"": "disk"}, "offload_folder": "x"}, ConfigError, "expected a device_map without 'disk'"),
        ({"low_cpu_mem_usage": False}, ValueError, "low_cpu_mem_usage"),
        ({"dtype": torch.float8_e4m3fn}, ConfigError, "expected dtype float32, float16 or bfloat16, got torch.float8"),
    ],
)
def test_weights_on_disk_and_models_filled_before_loading_are_refused(floats, quantized, settings, kind, message):
    for folder, config in ((quantized, None), (floats, W4A8)):
        with pytest.raises(kind, match=message):
            UNet2DModel.from_pretrained(folder / "unet", quantization_config=config, **settings)


def test_shards_may_be_read_by_many_threads(floats, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.models.modeling_utils.HF_ENABLE_PARALLEL_LOADING", True)
    whole = UNet2DModel.from_pretrained(floats / "unet", quantization_config=W4A8)
    modiff.save(whole, tmp_path / "shards", max_shard_size="2KB")
    SMALL.build().unet.save_pretrained(tmp_path / "floats", max_shard_size="9KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 5
    for folder, config in (("shards", None), ("floats", W4A8)):
        loaded = UNet2DModel.from_pretrained(tmp_path / folder, quantization_config=config)
        assert_same_tensors(loaded.state_dict(), whole.state_dict())


def test_a_folder_may_be_written_over_by_the_model_that_was_read_from_it(quantized, tmp_path):
    """Tensors that are views of a file would change, or end the process, when the file does. Variants keep a name."""
    unet = UNet2DModel.from_pretrained(quantized / "unet")
    unet.save_pretrained(tmp_path, variant="fp16")
    again = UNet2DModel.from_pretrained(tmp_path, variant="fp16")
    again.save_pretrained(tmp_path, variant="fp16")
    save_file({"x": torch.zeros(1)}, tmp_path / FILE.replace(".", ".fp16.", 1))
    assert_same_tensors(again.state_dict(), unet.state_dict())


@pytest.mark.parametrize("config", [None, ModiffDiffusersConfig("w8a8")])
def test_a_single_file_is_read_with_and_without_a_config(config, tmp_path):
    host = HOSTS["sd"]
    pipe = host.build()
    exact = host.call(pipe)
    pipe.unet.save_pretrained(tmp_path)
    unet = type(pipe.unet).from_single_file(str(tmp_path / FILE), config=str(tmp_path), quantization_config=config)
    pipe = host.around(unet)
    if config is None:
        modiff.apply(pipe, "w8a8")
    modiff.save(pipe, tmp_path / "saved")
    modiff.apply(reference := host.build(), "w8a8")
    modiff.pack(reference)
    for ours in (host.call(modiff.load(tmp_path / "saved")), *([] if config is None else [host.call(pipe)])):
        assert_same_bits(ours, host.call(reference))
        assert relative_error(ours, exact) < 0.05


def test_pickles_are_neither_written_nor_read(quantized, tmp_path):
    unet = UNet2DModel.from_pretrained(quantized / "unet")
    with pytest.raises(ConfigError, match="expected safe_serialization=True, got False"):
        unet.save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.glob("*.bin"))
    torch.save(unet.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(modiff.FormatError, match=r"model\.bin: expected safetensors, got another format"):
        UNet2DModel.from_pretrained(tmp_path, use_safetensors=False)


def test_another_quantizer_on_the_model_is_left_alone_and_not_saved_under_our_name(tmp_path):
    pipe = SMALL.build()
    pipe.unet.hf_quantizer = other = object()
    modiff.apply(pipe)
    with pytest.raises(modiff.StateError, match="save: expected a model that modiff alone quantized"):
        modiff.save(pipe, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []
    modiff.remove(pipe)
    assert pipe.unet.hf_quantizer is other
