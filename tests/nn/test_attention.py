"""Attention operands: each quantized as its quantizer says, the products as torch's, and nothing left behind."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from modiff import AttentionConfig, QuantizerConfig, StateError
from modiff.nn.attention import QuantizedAttention
from tests.helpers import assert_float_error, assert_same_bits, assert_within
from tests.reference import quantizer

SHAPE = (2, 3, 5, 4)  # batch, heads, tokens, channels


def operands(dtype=torch.float64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]


def config(bits: int | None = 8, softmax_bits: int | None = 8, granularity: str = "auto", **settings):
    return AttentionConfig(
        operands=QuantizerConfig(bits=bits, granularity=granularity, **settings),
        softmax=QuantizerConfig(bits=softmax_bits, symmetric=False, lowest="zero"),
    )


def softmax_of(scores: Tensor) -> Tensor:
    rows = scores.reshape(-1, scores.shape[-1]).tolist()
    exact = torch.tensor([[math.exp(v) for v in row] for row in rows], dtype=torch.float64)
    return (exact / exact.sum(1, keepdim=True)).reshape(scores.shape)


def reference(q: Tensor, k: Tensor, v: Tensor, bits: int, softmax_bits: int) -> Tensor:
    """Per-token q and k, per-sample v, per-query softmax from 0, all by the float64 reference quantizer."""
    q, k = (quantizer.quantize(x, bits, "token").value for x in (q, k))
    v = quantizer.quantize(v, bits, "sample").value
    p = softmax_of(q @ k.mT / math.sqrt(q.shape[-1]))
    step = p.amax(-1, keepdim=True) / (2**softmax_bits - 1)
    return torch.round(p / step) * step @ v


@pytest.mark.parametrize(("bits", "softmax_bits"), [(8, 8), (4, 4), (8, 2), (2, 8)])
def test_attention_of_quantized_operands_equals_the_reference(bits, softmax_bits):
    q, k, v = operands()
    ours = QuantizedAttention(config(bits, softmax_bits), "attention").attend(q, k, v)
    assert_within(ours, reference(q, k, v, bits, softmax_bits), 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_without_bits_the_call_is_torch_s_own_to_the_bit(dtype):
    q, k, v = operands(dtype)
    mask = torch.randn(5, 5).to(dtype)
    attend = QuantizedAttention(config(None, None), "attention").attend
    assert_same_bits(attend(q, k, v), functional.scaled_dot_product_attention(q, k, v))
    assert_same_bits(
        attend(q, k, v, mask, scale=0.3), functional.scaled_dot_product_attention(q, k, v, mask, scale=0.3)
    )


def exact_softmax(q: Tensor, k: Tensor, v: Tensor, **settings) -> Tensor:
    """Attention through the explicit path, which rounds nothing."""
    layer = QuantizedAttention(config(None, 16), "attention")
    layer.quantizers["softmax"].__class__ = type(
        "Exact", (type(layer.quantizers["softmax"]),), {"__call__": lambda *_: None}
    )
    return layer.attend(q, k, v, **settings)


BOOLEAN = torch.tensor([[True, True, False, False, False]] * 4 + [[False] * 5])  # the last query sees nothing


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"scale": 0.7},
        {"is_causal": True},
        {"enable_gqa": True},
        {"attn_mask": BOOLEAN},
        {"attn_mask": torch.linspace(-3, 3, 25).reshape(5, 5)},
        {"attn_mask": torch.zeros(2, 1, 1, 5).masked_fill(torch.arange(5) > 2, -torch.inf)},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_explicit_path_is_torch_s_attention(settings, dtype):
    q, k, v = operands(dtype)
    if "enable_gqa" in settings:
        k, v = k[:, :1], v[:, :1]
    mask = settings.get("attn_mask")
    cast = {"attn_mask": mask.to(dtype)} if mask is not None and mask.dtype != torch.bool else {}
    wide = {"attn_mask": cast["attn_mask"].double()} if cast else {}
    exact = functional.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), **settings | wide)
    plain = functional.scaled_dot_product_attention(q, k, v, **settings | cast)
    assert_float_error(exact_softmax(q, k, v, **settings | cast), plain, exact)


def test_dropout_acts_on_the_probabilities():
    q, k, _ = operands()
    torch.manual_seed(0)
    ours = exact_softmax(q, k, torch.eye(5, dtype=torch.float64).expand(2, 3, 5, 5), dropout_p=0.5)
    share = (ours == 0).double().mean().item()
    assert 0.3 < share < 0.7


class Products(nn.Module):
    """Two attention calls, by different names of the same function, and an error on request."""

    def __init__(self) -> None:
        super().__init__()
        self.fails: type[BaseException] | None = None
        self.explicit = False

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.fails is not None:
            raise self.fails("inside")
        if self.explicit:
            return (q @ k.mT).softmax(-1) @ v
        first = functional.scaled_dot_product_attention(q, k, v)
        return first + torch._C._nn.scaled_dot_product_attention(q, k, v, dropout_p=0.0)


def attached(bits: int | None = 8) -> tuple[Products, QuantizedAttention]:
    module, attention = Products(), QuantizedAttention(config(bits, bits), "blocks.0.attn")
    attention.attach(module)
    return module, attention


def test_calls_inside_the_module_are_quantized_and_those_outside_are_not():
    q, k, v = operands()
    module, attention = attached(4)
    assert_same_bits(module(q, k, v), 2 * attention.attend(q, k, v))
    exact = functional.scaled_dot_product_attention(q, k, v)
    assert_same_bits(exact, Products()(q, k, v) / 2)


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_a_module_that_raises_leaves_torch_as_it_was(error):
    q, k, v = operands()
    module, _ = attached(2)
    module.fails = error
    exact = functional.scaled_dot_product_attention(q, k, v)
    with pytest.raises(error, match="inside"):
        module(q, k, v)
    assert_same_bits(functional.scaled_dot_product_attention(q, k, v), exact)


def test_attention_that_is_computed_otherwise_is_an_error_and_not_left_in_floats():
    module, _ = attached()
    module.explicit = True
    with pytest.raises(StateError, match=r"blocks\.0\.attn: expected a call of torch's scaled_dot_product_attention"):
        module(*operands())


def test_autocast_rounds_neither_scores_nor_probabilities():
    q, k, v = (x * 40 for x in operands(torch.float32))
    attend = QuantizedAttention(config(None, 16), "attention").attend
    expected = attend(q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(attend(q, k, v), expected)
