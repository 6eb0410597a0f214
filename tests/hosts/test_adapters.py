"""IP-Adapter, textual inversion, ControlNet and T2I-Adapter, there before `apply` or loaded after it."""

from __future__ import annotations

import diffusers
import pytest
import torch

import modiff
from modiff import StateError, presets
from modiff.model.attach import attachment_of
from tests.helpers import assert_same_bits, relative_error
from tests.hosts.tiny import HOSTS, WIDTH, drawn

HOST = HOSTS["sd"]
CONFIG = presets.published(8, 8)  # anchors with the quantized weights, so that packing changes no bit
IMAGE = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(1))


def with_ip_adapter(pipe):
    """Drawn projections of an image to four tokens, and of the tokens to keys and values."""
    unet, generator, weights = pipe.unet, torch.Generator().manual_seed(5), {}
    for i, name in enumerate(n for n in unet.attn_processors if n.endswith("attn2.processor")):
        width = unet.get_submodule(name.removesuffix(".processor")).to_q.in_features
        for leaf in ("to_k_ip", "to_v_ip"):
            weights[f"{2 * i + 1}.{leaf}.weight"] = torch.randn(width, WIDTH, generator=generator) * WIDTH**-0.5
    projection = {"proj.weight": torch.randn(4 * WIDTH, WIDTH, generator=generator) * WIDTH**-0.5,
                  "proj.bias": torch.zeros(4 * WIDTH), "norm.weight": torch.ones(WIDTH),
                  "norm.bias": torch.zeros(WIDTH)}  # fmt: skip
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": weights}], low_cpu_mem_usage=False)
    pipe.set_ip_adapter_scale(0.7)
    return pipe


def call(pipe, scale=0.7):
    pipe.set_ip_adapter_scale(scale)
    return HOST.call(pipe, ip_adapter_image_embeds=[torch.stack([torch.zeros(1, WIDTH), IMAGE])])


@pytest.mark.parametrize("packed", [False, True])
def test_an_ip_adapter_works_in_either_order_and_goes_again(packed, tmp_path):
    first, after, plain = with_ip_adapter(HOST.build()), HOST.build(), HOST.build()
    exact = call(first)
    for pipe in (first, after, plain):
        modiff.apply(pipe, CONFIG)
        if packed:
            modiff.pack(pipe)
    assert attachment_of(first.unet).layers.keys() == attachment_of(after.unet).layers.keys()
    with_ip_adapter(after)
    without = HOST.call(plain)
    expected = call(first)
    assert relative_error(expected, exact) < 0.05 < relative_error(without, exact)
    assert_same_bits(call(after), expected)
    assert_same_bits(call(after, 0.2), call(first, 0.2))
    for pipe in (first, after):
        with pytest.raises(StateError, match=r"without adapters, got .*unload_ip_adapter"):
            modiff.save(pipe, tmp_path / "refused")
        pipe.unload_ip_adapter()
        assert_same_bits(HOST.call(pipe), without)
    modiff.save(first, tmp_path / "saved")
    assert_same_bits(HOST.call(modiff.load(tmp_path / "saved")), without)


@pytest.mark.parametrize("first", [False, True])
def test_remove_gives_back_the_model_with_its_ip_adapter(first):
    pipe = HOST.build()
    expected = call(with_ip_adapter(HOST.build()))
    pipe = with_ip_adapter(pipe) if first else pipe
    modiff.apply(pipe, presets.modulated(None, None))
    pipe = pipe if first else with_ip_adapter(pipe)
    assert relative_error(call(pipe), expected) < 1e-5
    modiff.remove(pipe)
    assert_same_bits(call(pipe), expected)
    pipe.unload_ip_adapter()
    assert_same_bits(HOST.call(pipe), HOST.call(HOST.build()))


def test_textual_inversion_is_a_matter_of_the_text_encoder_alone():
    token = {"<fox>": torch.full((1, WIDTH), 0.1)}
    results = []
    for first in (False, True):
        pipe = HOST.build()
        if first:
            pipe.load_textual_inversion(token)
        modiff.apply(pipe, CONFIG)
        if not first:
            pipe.load_textual_inversion(token)
        results.append(HOST.call(pipe, prompt=["red <fox>"]))
    assert_same_bits(*results)


def control_net(pipe):
    net = drawn(lambda: diffusers.ControlNetModel.from_unet(HOST.build().unet), seed=3)
    return diffusers.StableDiffusionControlNetPipeline(**pipe.components, controlnet=net, requires_safety_checker=False)


def t2i_adapter(pipe):
    adapter = drawn(lambda: diffusers.T2IAdapter(in_channels=3, channels=[32, 64], num_res_blocks=1,
                                                 downscale_factor=1, adapter_type="full_adapter"), seed=4)  # fmt: skip
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    return diffusers.StableDiffusionAdapterPipeline(**parts, adapter=adapter, requires_safety_checker=False)


@pytest.mark.parametrize("make", [control_net, t2i_adapter])
def test_a_network_next_to_the_denoiser_is_not_quantized_and_may_join_later(make):
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    first, pipe = make(HOST.build()), HOST.build()
    exact = HOST.call(first, image=image)
    for target in (first, pipe):
        modiff.apply(target, CONFIG)
    expected = HOST.call(first, image=image)
    assert 0 < relative_error(expected, exact) < 0.1
    later = make(pipe)
    for _ in range(2):
        assert_same_bits(HOST.call(later, image=image), expected)
    modiff.remove(first)
    assert_same_bits(HOST.call(first, image=image), exact)
