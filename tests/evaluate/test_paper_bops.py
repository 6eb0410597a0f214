"""The paper's U-Net: its operations and states, counted."""

from collections import Counter

import pytest
import torch
from torch import nn

from modiff.evaluate.cost import attention_macs
from tests.evaluate.counters import measure, torch_macs


@pytest.fixture(scope="module")
def ddpm():
    """The 35.7M-parameter CIFAR-10 U-Net of DDPM, on the meta device: shapes without numbers."""
    from diffusers import UNet2DModel

    attention_second, no_attention = ("AttnDownBlock2D", "AttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")
    down, up = zip(no_attention, attention_second, no_attention, no_attention, strict=True)
    channels = (128, 256, 256, 256)
    with torch.device("meta"):
        blocks = {"block_out_channels": channels, "down_block_types": down, "up_block_types": up[::-1]}
        unet = UNet2DModel(32, attention_head_dim=None, downsample_padding=0, **blocks)
        return unet.eval(), (torch.empty(1, 3, 32, 32), torch.zeros(1))


@pytest.fixture(scope="module")
def ddpm_cost(ddpm):
    unet, inputs = ddpm
    return measure(unet, *inputs)


def total(costs):
    return sum(layer.macs for layer in costs)


def layers_of(cost):
    return [layer for layer in cost if layer.weight_elements]


def test_ddpm_unet_has_6_05_gmac_in_layers_and_0_168_in_attention(ddpm, ddpm_cost):
    unet, inputs = ddpm
    assert sum(p.numel() for p in unet.parameters()) == 35_746_307
    layers = sum(layer.macs for layer in layers_of(ddpm_cost))
    assert layers == 6_053_953_536
    # one head of 256 channels: five blocks of 256 tokens and one of 16
    large, small = attention_macs(1, 1, 256, 256, 256, 256), attention_macs(1, 1, 16, 16, 256, 256)
    assert total(ddpm_cost) - layers == 5 * large + small == 167_903_232
    assert total(ddpm_cost) == torch_macs(unet, *inputs)


def test_paper_bops_are_met_by_attention_at_two_operations_per_mac(ddpm_cost):
    """The published GBOPs are 6.39 GMAC x bits; beyond convolutions and linear layers that is twice the attention."""
    layers = sum(layer.macs for layer in layers_of(ddpm_cost))
    counted = layers + 2 * (total(ddpm_cost) - layers)
    assert counted / 1e9 == pytest.approx(1636 / (8 * 32), abs=0.005)
    assert round(counted * 8 * 32 / 1e9) == 1636
    assert round(total(ddpm_cost) * 8 * 32 / 1e9) == 1593  # attention once
    assert round(layers * 8 * 32 / 1e9) == 1550  # no attention
    # A32, A8, A6, A4, A3, A2. 204.47 is printed as 205 at W8A4 and as 204 at W4A8, hence 0.6
    for weight_bits, row in {8: (1636, 409, 307, 205, 153, 102), 4: (818, 204, 153, 102, 77, 51)}.items():
        ours = [counted * weight_bits * activation_bits / 1e9 for activation_bits in (32, 8, 6, 4, 3, 2)]
        assert ours == pytest.approx(list(row), abs=0.6)


def test_ddpm_unet_keeps_the_state_elements_that_the_paper_half_counts(ddpm, ddpm_cost):
    unet, layers = ddpm[0], layers_of(ddpm_cost)
    # The paper's code writes the four projections of its six attention blocks as 1x1 convolutions: 89 + 24.
    kinds = {layer.name: type(unet.get_submodule(layer.name)) for layer in layers}
    assert Counter(kinds.values()) == {nn.Conv2d: 65, nn.Linear: 48}
    assert sum(kind is nn.Conv2d or ".attentions." in name for name, kind in kinds.items()) == 89
    assert sum(layer.output_elements for layer in layers) == 4_768_640
    assert sum(layer.input_elements for layer in layers) == 6_388_992
