"""Attention operands: each quantized as its quantizer says, the products as torch's, and nothing left behind."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from modiff import AttentionConfig, QuantizerConfig
from modiff.nn.attention import QuantizedAttention
from tests.helpers import assert_float_error, assert_same_bits, assert_within
from tests.reference import quantizer


def operands(dtype=torch.float64) -> list[Tensor]:
    """(batch, heads, tokens, channels)."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 5, 4, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]


def attention(bits: int | None, softmax_bits: int | None) -> QuantizedAttention:
    softmax = QuantizerConfig(bits=softmax_bits, symmetric=False, lowest="zero")
    return QuantizedAttention(AttentionConfig(operands=QuantizerConfig(bits=bits), softmax=softmax), "blocks.0.attn")


@pytest.mark.parametrize(("bits", "softmax_bits"), [(8, 8), (4, 4), (8, 2), (2, 8)])
def test_attention_of_quantized_operands_equals_the_reference(bits, softmax_bits):
    """Per-token q and k, per-sample v, per-query softmax from 0, all by the float64 reference quantizer."""
    exact = operands()
    q, k, v = (
        quantizer.quantize(x, bits, kind).value for x, kind in zip(exact, ("token", "token", "sample"), strict=True)
    )
    rows = (q @ k.mT / math.sqrt(q.shape[-1])).reshape(-1, 5).tolist()
    weights = torch.tensor([[math.exp(value) for value in row] for row in rows], dtype=torch.float64)
    p = (weights / weights.sum(1, keepdim=True)).reshape(2, 3, 5, 5)
    scale = p.amax(-1, keepdim=True) / (2**softmax_bits - 1)
    ours = attention(bits, softmax_bits).attend(*exact)
    assert_within(ours, torch.round(p / scale) * scale @ v, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_without_bits_the_call_is_torch_s_own_to_the_bit(dtype):
    arguments = (*operands(dtype), torch.randn(5, 5).to(dtype))
    ours = attention(None, None).attend(*arguments, scale=0.3)
    assert_same_bits(ours, functional.scaled_dot_product_attention(*arguments, scale=0.3))


def exact_softmax(*operands: Tensor, **settings) -> Tensor:
    """Attention through the explicit path, which rounds nothing."""
    layer = attention(None, 16)
    layer.quantizers["softmax"] = lambda _: None
    return layer.attend(*operands, **settings)


BOOLEAN = torch.tensor([[True, True, False, False, False]] * 4 + [[False] * 5])  # the last query sees nothing


@pytest.mark.parametrize("settings", [
    {},
    {"scale": 0.7},
    {"is_causal": True},
    {"enable_gqa": True},
    {"attn_mask": BOOLEAN},
    {"attn_mask": torch.linspace(-3, 3, 25).reshape(5, 5)},
    {"attn_mask": torch.zeros(2, 1, 1, 5).masked_fill(torch.arange(5) > 2, -torch.inf)},
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_explicit_path_is_torch_s_attention(settings, dtype):
    q, k, v = operands(dtype)
    if "enable_gqa" in settings:
        k, v = k[:, :1], v[:, :1]
    mask = settings.get("attn_mask", BOOLEAN)
    cast = settings if mask.dtype == torch.bool else {"attn_mask": mask.to(dtype)}
    wide = settings if mask.dtype == torch.bool else {"attn_mask": cast["attn_mask"].double()}
    exact = functional.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), **wide)
    assert_float_error(exact_softmax(q, k, v, **cast), functional.scaled_dot_product_attention(q, k, v, **cast), exact)


class Products(nn.Module):
    """Two attention calls, by different names of the same function, or what it is told to do instead."""

    instead = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.instead is not None:
            return self.instead(q, k, v)
        first = functional.scaled_dot_product_attention(q, k, v)
        return first + torch._C._nn.scaled_dot_product_attention(q, k, v, dropout_p=0.0)


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_calls_inside_the_module_are_quantized_and_those_outside_are_not_also_after_an_error(error):
    def fails(*_: Tensor) -> None:
        raise error("inside")

    module, layer = Products(), attention(4, 4)
    exact = module(*operands())
    layer.attach(module)
    assert_same_bits(module(*operands()), 2 * layer.attend(*operands()))
    module.instead = fails
    with pytest.raises(error, match="inside"):
        module(*operands())
    assert_same_bits(Products()(*operands()), exact)


def test_autocast_rounds_neither_scores_nor_probabilities():
    q, k, v = (x * 40 for x in operands(torch.float32))
    expected = attention(None, 16).attend(q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(attention(None, 16).attend(q, k, v), expected)
