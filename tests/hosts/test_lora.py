"""LoRA through PEFT: with modulated and packed layers, before and after; fused where there are floats for it."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

import modiff
from modiff import StateError, presets
from modiff.nn import ModulatedLinear
from tests.helpers import assert_same_bits, relative_error
from tests.hosts.tiny import HOSTS

peft = pytest.importorskip("peft")

HOST = HOSTS["sd"]
TARGETS = ["to_q", "to_v", "ff.net.0.proj"]


def call(pipe: StableDiffusionPipeline) -> torch.Tensor:
    return HOST.call(pipe, steps=2)


def with_lora(pipe: StableDiffusionPipeline) -> StableDiffusionPipeline:
    pipe.unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS), "style")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return pipe


@pytest.fixture(scope="module")
def exact() -> torch.Tensor:
    """The full-precision pipeline with the LoRA, which moves the result far."""
    pipe = HOST.build()
    plain = call(pipe)
    expected = call(with_lora(pipe))
    assert relative_error(expected, plain) > 0.2
    return expected


def quantized(packed: bool) -> StableDiffusionPipeline:
    pipe = HOST.build()
    modiff.apply(pipe, presets.w8a8())
    if packed:
        modiff.pack(pipe)
    return pipe


@pytest.mark.parametrize("packed", [False, True])
def test_an_adapter_on_quantized_layers_works_and_leaves_no_trace(exact, packed):
    pipe = quantized(packed)
    without = call(pipe)
    with_lora(pipe)
    layer = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q
    assert isinstance(layer.base_layer, ModulatedLinear)
    assert layer.lora_A["style"].weight.dtype == torch.float32
    assert relative_error(call(pipe), exact) < 0.05
    pipe.unet.set_adapters(["style"], [0.0])
    assert_same_bits(call(pipe), without)
    pipe.unet.unload_lora()
    assert_same_bits(call(pipe), without)


def test_an_adapter_that_was_there_first_stays_and_can_be_switched(exact):
    pipe = HOST.build()
    plain = call(pipe)
    modiff.apply(with_lora(pipe), presets.w8a8())
    assert relative_error(call(pipe), exact) < 0.05
    pipe.unet.disable_lora()
    assert relative_error(call(pipe), plain) < 0.05
    modiff.remove(pipe)
    pipe.unet.enable_lora()
    assert_same_bits(call(pipe), exact)


def test_fusing_into_floats_is_seen_by_the_next_generation(exact):
    pipe = with_lora(quantized(packed=False))
    pipe.unet.fuse_lora()
    assert relative_error(call(pipe), exact) < 0.05


def test_fusing_into_integers_is_refused(tmp_path, exact):
    modiff.save(quantized(packed=False).unet, tmp_path / "unet")
    for pipe in (quantized(packed=True), HOST.build()):
        if not hasattr(pipe.unet, "hf_quantizer"):
            pipe.unet = modiff.load(tmp_path / "unet")
        with_lora(pipe)
        before = {name: p.clone() for name, p in pipe.unet.named_parameters()}
        with pytest.raises(StateError, match="fuse_lora: expected float weights to add the LoRA to"):
            pipe.unet.fuse_lora()
        with pytest.raises(StateError, match="fuse_lora"):
            pipe.fuse_lora()
        for name, parameter in pipe.unet.named_parameters():
            assert_same_bits(parameter, before[name])
        assert relative_error(call(pipe), exact) < 0.05
