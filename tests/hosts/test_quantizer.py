"""modiff among diffusers' quantization methods: every trap that an outside quantizer can fall into."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig, UNet2DModel, WanTransformer3DModel
from safetensors.torch import load_file, save_file

import modiff
from modiff import ConfigError, LayerConfig, ModiffConfig, ModiffDiffusersConfig, WeightConfig, presets
from modiff.hosts.diffusers.quantizer import align
from modiff.model.attach import attachment_of
from tests.helpers import assert_same_bits
from tests.hosts.tiny import HOSTS
from tests.pixels import pixel_pipeline, saved_pipeline

FILE = "diffusion_pytorch_model.safetensors"


def call(pipe: DiffusionPipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return torch.from_numpy(pipe(2, generator, num_inference_steps=3, output_type="np", return_dict=False)[0])


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_pipeline(tmp_path_factory.mktemp("floats") / "pipe")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipe = pixel_pipeline()
    modiff.apply(pipe, presets.w4a8())
    modiff.save(pipe, tmp_path_factory.mktemp("quantized") / "pipe")
    return tmp_path_factory.getbasetemp() / "quantized0" / "pipe"


def with_unet(unet: torch.nn.Module) -> DiffusionPipeline:
    pipe = pixel_pipeline()
    pipe.unet = unet
    return pipe


# --------------------------------------------------------------------------------------------------- the config

CONFIGS = [ModiffDiffusersConfig(), ModiffDiffusersConfig(presets.tuned(4, 3), ["conv2"])]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_is_json_and_comes_back(config):
    """Trap 1: diffusers evaluates repr() and to_diff_dict(), which its own base class does not have."""
    values = json.loads(json.dumps(config.to_dict()))
    again = ModiffDiffusersConfig.from_dict(values)
    assert again == config
    assert again.config == config.config
    assert again.chosen == config.chosen
    assert dict(config) == values
    assert json.loads(config.to_json_string(use_diff=False)) == values
    assert json.loads(config.to_json_string()) == config.to_diff_dict()
    assert config.to_diff_dict().keys() <= values.keys()
    assert repr(config).startswith("ModiffDiffusersConfig(ModiffConfig(")
    assert ModiffDiffusersConfig.from_dict(values, return_unused_kwargs=True, more=1) == (config, {"more": 1})


def test_settings_may_come_as_a_dictionary_and_nonsense_may_not():
    assert ModiffDiffusersConfig(presets.w4a8().to_dict()) == ModiffDiffusersConfig(presets.w4a8())
    for wrong in ("w4a8", 4):
        with pytest.raises(ConfigError, match=r"ModiffDiffusersConfig.config: expected a ModiffConfig, got"):
            ModiffDiffusersConfig(wrong)
    with pytest.raises(ConfigError, match="ModiffConfig"):
        ModiffDiffusersConfig({"unheard_of": 1})


TABLES = """
import modiff, modiff.hosts, torch
import diffusers
from diffusers.quantizers import auto
tables = auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING
modiff.apply(torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(3))))
print(["modiff" in table for table in tables])
try:
    modiff.select(diffusers.UNet2DModel(block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2,
                                        up_block_types=("UpBlock2D",) * 2), "w8a8")
finally:
    print(["modiff" in table for table in tables])
from modiff.hosts.diffusers.quantizer import leave_tables
leave_tables()
print(["modiff" in table for table in tables])
"""


def test_the_tables_of_diffusers_change_when_its_first_object_is_met_and_can_be_changed_back():
    done = subprocess.run([sys.executable, "-c", TABLES], capture_output=True, text=True, check=True, timeout=170)
    assert done.stdout.splitlines() == ["[False, False]", "[True, True]", "[False, False]"]


UNREGISTERED = """
import sys, warnings
warnings.simplefilter("ignore")
from diffusers import UNet2DModel
try:
    UNet2DModel.from_pretrained(sys.argv[1])
except ValueError as error:
    print(str(error).splitlines()[0])
from modiff import ModiffDiffusersConfig
print(type(UNet2DModel.from_pretrained(sys.argv[1]).hf_quantizer).__name__)
"""


def test_a_process_that_never_met_modiff_is_told_so_by_diffusers_and_one_name_is_enough(quantized):
    """Trap 8: diffusers has no plugins; something of modiff must be imported, and the error is diffusers' own."""
    probe = [sys.executable, "-c", UNREGISTERED, str(quantized / "unet")]
    done = subprocess.run(probe, capture_output=True, text=True, check=True, timeout=170)
    refused, loaded = done.stdout.strip().splitlines()
    assert refused.startswith("Unknown quantization type, got modiff")
    assert loaded == "ModiffQuantizer"


# ------------------------------------------------------------------------------------------- from_pretrained, floats


@pytest.mark.parametrize(
    "config",
    [
        presets.w8a8(),
        presets.tuned(4, 4),
        presets.plain(3, 8),
        ModiffConfig(layer=LayerConfig(weight=WeightConfig(bits=None)), overrides=(("*conv1", LayerConfig()),)),
    ],
)
def test_on_the_fly_gives_the_bits_of_apply_and_pack(floats, config):
    """Trap 4: keys that the empty model does not have are skipped without a word, so layers are swapped in place."""
    unet, info = UNet2DModel.from_pretrained(
        floats / "unet", quantization_config=ModiffDiffusersConfig(config), output_loading_info=True
    )
    assert not any(info.values())
    pipe = pixel_pipeline()
    modiff.apply(pipe, config)
    modiff.pack(pipe)
    expected = pipe.unet.state_dict()
    assert unet.state_dict().keys() == expected.keys()
    for name, tensor in unet.state_dict().items():
        assert_same_bits(tensor, expected[name])
    assert_same_bits(call(with_unet(unet)), call(pipe))
    assert not unet.training


def test_on_the_fly_for_a_pipeline_by_component(floats, tmp_path):
    """Trap 3: the mapping works; the string form asks transformers for the method, too, and is refused."""
    mapping = PipelineQuantizationConfig(quant_mapping={"unet": ModiffDiffusersConfig(presets.w4a8())})
    pipe = DiffusionPipeline.from_pretrained(floats, quantization_config=mapping)
    expected = call(pipe)
    assert attachment_of(pipe.unet) is not None
    pipe.save_pretrained(tmp_path / "saved")
    assert_same_bits(call(DiffusionPipeline.from_pretrained(tmp_path / "saved")), expected)
    assert_same_bits(call(modiff.load(tmp_path / "saved")), expected)
    with pytest.raises(ValueError, match="quant_backend=modiff was not found"):
        PipelineQuantizationConfig(quant_backend="modiff", quant_kwargs={"config": {}})
    with pytest.raises(ValueError, match="must be an instance of `PipelineQuantizationConfig`"):
        DiffusionPipeline.from_pretrained(floats, quantization_config=ModiffDiffusersConfig())


def test_the_config_file_says_that_the_model_is_quantized(floats, tmp_path):
    """Trap 6: diffusers leaves the entry out unless the quantizer registers it."""
    unet = UNet2DModel.from_pretrained(floats / "unet", quantization_config=ModiffDiffusersConfig(presets.w4a8()))
    assert isinstance(unet.config.quantization_config, ModiffDiffusersConfig)
    assert unet.config.quantization_config.config == presets.w4a8()
    assert unet.config._pre_quantization_dtype is None
    for folder in ("one", "two"):  # diffusers puts the dictionary of the first save into the model's config
        unet.save_pretrained(tmp_path / folder)
        values = json.loads((tmp_path / folder / "config.json").read_text())["quantization_config"]
        assert (values["quant_method"], values["version"]) == ("modiff", 1)
        assert set(values["layers"]) == set(attachment_of(unet).layers)
        assert load_file(tmp_path / folder / FILE).keys() == unet.state_dict().keys()


def test_one_config_serves_two_models(floats):
    config = ModiffDiffusersConfig(presets.w4a8())
    one, two = (UNet2DModel.from_pretrained(floats / "unet", quantization_config=config) for _ in range(2))
    assert config == ModiffDiffusersConfig(presets.w4a8())
    assert one.config.quantization_config is not two.config.quantization_config


def test_modules_to_not_convert_stay_in_full_precision(floats):
    """Trap 9: the name that diffusers' users know."""
    config = ModiffDiffusersConfig(presets.w8a8(), modules_to_not_convert=["conv2", "mid_block"])
    unet = UNet2DModel.from_pretrained(floats / "unet", quantization_config=config)
    taken = set(attachment_of(unet).layers)
    assert taken
    assert not any("conv2" in name or "mid_block" in name for name in taken)
    with pytest.raises(ConfigError, match="nothing_like_it"):
        UNet2DModel.from_pretrained(
            floats / "unet", quantization_config=ModiffDiffusersConfig(modules_to_not_convert=["nothing_like_it"])
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_the_fly_in_half_precision_quantizes_the_rounded_weights_with_float32_scales(floats, dtype):
    unet = UNet2DModel.from_pretrained(
        floats / "unet", dtype=dtype, quantization_config=ModiffDiffusersConfig(presets.w4a8())
    )
    assert unet.config._pre_quantization_dtype == dtype
    pipe = pixel_pipeline().to(dtype)
    modiff.apply(pipe, presets.w4a8())
    modiff.pack(pipe)
    for name, tensor in pipe.unet.state_dict().items():
        assert_same_bits(unet.state_dict()[name], tensor)
    assert {t.dtype for n, t in unet.state_dict().items() if n.endswith("weight_scale")} == {torch.float32}
    assert unet.dtype == dtype


def test_a_damaged_float_weight_is_refused(floats, tmp_path):
    unet = pixel_pipeline().unet
    unet.down_blocks[0].resnets[0].conv1.weight.data[0] = float("nan")
    unet.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"conv1.weight: expected finite numbers"):
        UNet2DModel.from_pretrained(tmp_path, quantization_config=ModiffDiffusersConfig())


# --------------------------------------------------------------------------------------- from_pretrained, quantized


def test_scales_are_not_rounded_to_the_dtype_of_the_model(quantized):
    """Trap 5: floats are cast before the quantizer sees them; a bfloat16 scale is off by up to 0.4 %."""
    exact = load_file(quantized / "unet" / FILE)
    unet = UNet2DModel.from_pretrained(quantized / "unet", dtype=torch.bfloat16)
    scales = [name for name in exact if name.endswith("weight_scale")]
    assert scales
    for name in scales:
        assert_same_bits(unet.state_dict()[name], exact[name])
        assert (exact[name] != exact[name].bfloat16().float()).any()
    assert unet.conv_in.weight.dtype == torch.bfloat16


def test_modules_that_diffusers_keeps_in_float32_stay_so_and_its_class_is_not_changed(tmp_path):
    """Trap 5: the list of such modules is the class's own; adding to it would change every later model."""
    host = HOSTS["wan"]
    pipe = host.build()
    before = list(WanTransformer3DModel._keep_in_fp32_modules)
    pipe.transformer.save_pretrained(tmp_path / "floats")
    modiff.apply(pipe, presets.w8a8())
    modiff.save(pipe.transformer, tmp_path / "saved")
    plain = WanTransformer3DModel.from_pretrained(tmp_path / "floats", dtype=torch.bfloat16)
    fly = ModiffDiffusersConfig(presets.w8a8())
    for quantized in (
        WanTransformer3DModel.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16),
        WanTransformer3DModel.from_pretrained(tmp_path / "floats", dtype=torch.bfloat16, quantization_config=fly),
    ):
        for name, parameter in plain.named_parameters():
            ours = quantized.get_parameter(name)
            assert ours.dtype in (parameter.dtype, torch.int8)
        assert quantized.scale_shift_table.dtype == torch.float32
    assert WanTransformer3DModel._keep_in_fp32_modules == before


def test_casting_is_refused_and_moving_is_not(floats, quantized):
    """Trap 9."""
    loaded = UNet2DModel.from_pretrained(quantized / "unet")
    pipe = pixel_pipeline()
    modiff.apply(pipe, presets.w4a8())
    pipe.to(torch.float64).to(torch.float32)
    modiff.pack(pipe)
    for unet in (loaded, pipe.unet):
        for cast in (
            unet.half,
            unet.float,
            lambda u=unet: u.to(torch.float16),
            lambda u=unet: u.to(dtype=torch.float16),
        ):
            with pytest.raises(ValueError, match=r"not supported|unsupported"):
                cast()
        with pytest.raises(NotImplementedError, match="dequantize"):
            unet.dequantize()
        assert unet.to("cpu") is unet
    assert_same_bits(call(with_unet(loaded)), call(pipe))


def test_a_config_for_a_quantized_folder_is_ignored_with_a_warning(quantized):
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        unet = UNet2DModel.from_pretrained(
            quantized / "unet", quantization_config=ModiffDiffusersConfig(presets.w8a8())
        )
    assert unet.config.quantization_config.config == presets.w4a8()


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "cpu"])
def test_a_device_map_places_packed_weights(floats, quantized, device_map):
    for folder, config in ((quantized, None), (floats, ModiffDiffusersConfig(presets.w4a8()))):
        plain = UNet2DModel.from_pretrained(folder / "unet", quantization_config=config)
        placed = UNet2DModel.from_pretrained(folder / "unet", device_map=device_map, quantization_config=config)
        align(placed)
        assert_same_bits(call(with_unet(placed)), call(with_unet(plain)))
        assert not any(tensor.is_meta for tensor in placed.state_dict().values())


def test_weights_on_disk_and_models_filled_before_loading_are_refused(floats, quantized, tmp_path):
    for folder, config in ((quantized, None), (floats, ModiffDiffusersConfig())):
        with pytest.raises(ConfigError, match="expected a device_map without 'disk', got one with it"):
            UNet2DModel.from_pretrained(
                folder / "unet", device_map={"": "disk"}, offload_folder=str(tmp_path), quantization_config=config
            )
        with pytest.raises(ValueError, match="low_cpu_mem_usage"):
            UNet2DModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False, quantization_config=config)
        with pytest.raises(ConfigError, match=r"expected dtype float32, float16 or bfloat16, got torch.float8_e4m3fn"):
            UNet2DModel.from_pretrained(folder / "unet", dtype=torch.float8_e4m3fn, quantization_config=config)


@pytest.mark.parametrize("parallel", [False, True])
def test_shards_may_be_read_by_many_threads(floats, tmp_path, monkeypatch, parallel):
    monkeypatch.setattr("diffusers.models.modeling_utils.HF_ENABLE_PARALLEL_LOADING", parallel)
    whole = UNet2DModel.from_pretrained(floats / "unet", quantization_config=ModiffDiffusersConfig(presets.w4a8()))
    whole.save_pretrained(tmp_path / "shards", max_shard_size="2KB")
    pixel_pipeline().unet.save_pretrained(tmp_path / "floats", max_shard_size="9KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 5
    for loaded in (
        UNet2DModel.from_pretrained(tmp_path / "shards"),
        UNet2DModel.from_pretrained(tmp_path / "floats", quantization_config=ModiffDiffusersConfig(presets.w4a8())),
    ):
        for name, tensor in whole.state_dict().items():
            assert_same_bits(loaded.state_dict()[name], tensor)


def test_a_folder_may_be_written_over_by_the_model_that_was_read_from_it(quantized, tmp_path):
    """Tensors that are views of a file would change, or end the process, when the file does."""
    unet = UNet2DModel.from_pretrained(quantized / "unet")
    unet.save_pretrained(tmp_path)
    again = UNet2DModel.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / FILE)
    for name, tensor in unet.state_dict().items():
        assert_same_bits(again.state_dict()[name], tensor)


def test_pickles_are_neither_written_nor_read(quantized, tmp_path):
    unet = UNet2DModel.from_pretrained(quantized / "unet")
    with pytest.raises(ConfigError, match="expected safe_serialization=True, got False"):
        unet.save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.glob("*.bin"))
    torch.save(unet.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(modiff.FormatError, match=r"model\.bin: expected safetensors, got another format"):
        UNet2DModel.from_pretrained(tmp_path, use_safetensors=False)


def test_variants_keep_their_names(quantized, tmp_path):
    unet = UNet2DModel.from_pretrained(quantized / "unet")
    unet.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "diffusion_pytorch_model.fp16.safetensors").is_file()
    again = UNet2DModel.from_pretrained(tmp_path, variant="fp16")
    for name, tensor in unet.state_dict().items():
        assert_same_bits(again.state_dict()[name], tensor)


def test_another_quantizer_on_the_model_is_not_saved_under_our_name(tmp_path):
    pipe = pixel_pipeline()
    modiff.apply(pipe)
    pipe.unet.hf_quantizer = object()
    with pytest.raises(modiff.StateError, match="save: expected a model that modiff alone quantized"):
        modiff.save(pipe, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []
