"""Counts against torch's own counter and the paper's figures, and bit-operations by hand."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from modiff import presets
from modiff.config import LayerConfig, ModulationConfig
from modiff.evaluate.cost import LayerCost, measure_cost, trajectory_gbops
from modiff.model.report import Entry, Report


def measure(module, *inputs):
    return measure_cost(module, lambda: module(*inputs))


def torch_macs(module, *inputs):
    """torch's own count; it counts two operations per MAC and knows no fused attention on the CPU."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        module(*inputs)
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2


def attention_macs(batch, heads, queries, keys, head_dim, value_dim):
    """Both products, Q K^T and softmax V."""
    return batch * heads * queries * keys * (head_dim + value_dim)


class Apply(nn.Module):
    """A module around a function, for products that no layer owns."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def only(cost):
    (layer,) = cost
    return layer


def test_multi_head_attention_is_counted_although_its_fast_path_is_one_operation():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 8)
    expected = torch_macs(encoder.train(), x)  # training takes the slow path
    assert expected == 2 * 5 * (4 * 8 * 8 + 2 * 8 * 16) + attention_macs(2, 2, 5, 5, 4, 4)
    assert sum(layer.macs for layer in measure(encoder.eval(), x)) == expected


Q, K, V = torch.randn(2, 3, 7, 8), torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 4)
PRODUCTS = {
    "fused": (F.scaled_dot_product_attention, (Q, K, K)),
    "fused, narrow values": (F.scaled_dot_product_attention, (Q, K, V)),
    "fused, without heads": (F.scaled_dot_product_attention, (Q[0], K[0], V[0])),
    "fused, causal": (lambda q, k: F.scaled_dot_product_attention(q, k, k, is_causal=True), (K, K)),
    "written out": (lambda q, k, v: (q @ k.mT).softmax(-1) @ v, (Q, K, V)),
    "einsum": (lambda q, k: torch.einsum("bhqd,bhkd->bhqk", q, k), (Q, K)),
    "baddbmm": (lambda q, k: torch.baddbmm(torch.zeros(2, 7, 9), q, k.mT, beta=0), (Q[:, 0], K[:, 0])),
    "addmm": (lambda q, k: torch.addmm(torch.zeros(7, 9), q, k.mT), (Q[0, 0], K[0, 0])),
    "functional linear": (F.linear, (Q, K[0, 0])),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_activations_agree_with_torchs_own_counter(name, mode):
    function, inputs = PRODUCTS[name]
    module = Apply(mode()(function))
    layer = only(measure(module, *inputs))
    assert (layer.name, layer.weight_elements) == ("", 0)
    assert layer.macs == torch_macs(module, *inputs) > 0


def test_products_that_torchs_counter_does_not_know_are_counted_too():
    vector, codes = K[0, 0, 0], torch.ones(7, 8, dtype=torch.int8)
    assert only(measure(Apply(torch.matmul), Q, vector)).macs == Q.numel()
    assert only(measure(Apply(torch.addmv), torch.zeros(7), Q[0, 0], vector)).macs == 7 * 8
    assert only(measure(Apply(torch.matmul), vector, vector)).macs == 8
    assert only(measure(Apply(torch._int_mm), codes, codes.T)).macs == 7 * 7 * 8


class Block(nn.Module):
    """Attention by hand, with one layer called twice."""

    def __init__(self):
        super().__init__()
        self.qk = nn.Linear(8, 8)
        self.heads = Apply(F.scaled_dot_product_attention)
        self.out = nn.Conv1d(8, 4, 1)

    def forward(self, x):
        q, k = self.qk(x), self.qk(x[:, :3])
        x = self.heads(q[:, None], k[:, None], k[:, None])[:, 0]
        return self.out((x @ x.mT @ x).mT)


def test_layers_are_named_in_order_and_their_calls_summed():
    block, x = Block(), torch.randn(2, 5, 8)
    cost = measure(block, x)
    assert [layer.name for layer in cost] == ["", "qk", "heads", "out"]
    products, qk, heads, out = cost
    assert (qk.macs, qk.weight_elements) == ((10 + 6) * 64, 64)
    assert (qk.input_elements, qk.output_elements) == (2 * 8 * 8, 2 * 8 * 8)
    assert heads.macs == attention_macs(2, 1, 5, 3, 8, 8)
    assert products.macs == attention_macs(2, 1, 5, 5, 8, 8)
    assert out.macs == 2 * 5 * 8 * 4
    assert sum(layer.macs for layer in cost) == torch_macs(block, x)


def test_model_is_left_as_it_was_also_when_forward_raises():
    block, x = Block(), torch.randn(2, 5, 8)
    fast, before = torch.backends.mha.get_fastpath_enabled(), measure(block, x)

    handle = block.heads.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure(block, x)
    handle.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled() is fast is True
    assert block(x).requires_grad
    assert measure(block, x) == before


def giga(names: str) -> list[LayerCost]:
    return [LayerCost(name=name, macs=10**9) for name in names]


def w8a4(**settings: object) -> LayerConfig:
    return dataclasses.replace(presets.modulated(8, 4).layer, modulation=ModulationConfig(**settings))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (presets.plain(8, 4).layer, 10 * 8 * 4),
        (w8a4(), 32 * 32 + 9 * 8 * 4),
        (presets.published(8, 4).layer, 8 * 32 + 9 * 8 * 4),
        (presets.modulated(None, 4).layer, 32 * 32 + 9 * 32 * 4),
        (presets.modulated(8, None).layer, 10 * 8 * 32),
        (presets.modulated(8, 0).layer, 32 * 32),
        (w8a4(first_step="coded", rounds=3), 8 * 12 + 9 * 8 * 4),
        (w8a4(reanchor_every=4, stagger=False), 3 * 32 * 32 + 7 * 8 * 4),
        (w8a4(reanchor_every=3), 4 * 32 * 32 + 6 * 8 * 4),
        (w8a4(reanchor_every=3, anchor_weights="quantized"), 4 * 8 * 32 + 6 * 8 * 4),
    ],
)
def test_a_layer_counts_each_step_at_the_bits_it_runs_with(config: LayerConfig, expected: int) -> None:
    report = Report((Entry("a", "Conv2d", 1, config, ""),))
    assert trajectory_gbops(giga("a"), report, 10) == expected


def test_layers_that_were_left_and_attention_count_in_full_precision() -> None:
    report = Report((Entry("a", "Conv2d", 1, presets.plain(8, 8).layer, ""), Entry("b", "Conv2d", 1, None, "tiny")))
    assert trajectory_gbops(giga("abc"), report, 2) == 2 * (8 * 8 + 2 * 32 * 32)
    assert trajectory_gbops(giga("ab"), None, 3) == 3 * 2 * 32 * 32


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
    """All of its costs, and those of its layers."""
    costs = measure(ddpm[0], *ddpm[1])
    return costs, [layer for layer in costs if layer.weight_elements]


def total(costs):
    return sum(layer.macs for layer in costs)


def test_ddpm_unet_has_6_05_gmac_in_layers_and_0_168_in_attention(ddpm, ddpm_cost):
    (unet, inputs), (costs, layers) = ddpm, ddpm_cost
    assert sum(p.numel() for p in unet.parameters()) == 35_746_307
    assert total(layers) == 6_053_953_536
    # one head of 256 channels: five blocks of 256 tokens and one of 16
    large, small = attention_macs(1, 1, 256, 256, 256, 256), attention_macs(1, 1, 16, 16, 256, 256)
    assert total(costs) - total(layers) == 5 * large + small == 167_903_232
    assert total(costs) == torch_macs(unet, *inputs)


def test_paper_bops_are_met_by_attention_at_two_operations_per_mac(ddpm_cost):
    """The published GBOPs are 6.39 GMAC x bits; beyond convolutions and linear layers that is twice the attention."""
    once, layers = map(total, ddpm_cost)
    counted = layers + 2 * (once - layers)
    assert [round(macs * 8 * 32 / 1e9) for macs in (counted, once, layers)] == [1636, 1593, 1550]
    # A32, A8, A6, A4, A3, A2. 204.47 is printed as 205 at W8A4 and as 204 at W4A8, hence 0.6
    for weight_bits, row in {8: (1636, 409, 307, 205, 153, 102), 4: (818, 204, 153, 102, 77, 51)}.items():
        ours = [counted * weight_bits * activation_bits / 1e9 for activation_bits in (32, 8, 6, 4, 3, 2)]
        assert ours == pytest.approx(list(row), abs=0.6)
