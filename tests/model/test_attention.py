"""Which attention modules are taken, and that taking them back leaves nothing."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import modiff
from modiff import AttentionConfig, ConfigError, QuantizerConfig
from modiff.model.attention import apply_attention, attention_modules, attention_quantizers, remove_attention
from modiff.model.calibrate import quantizers_of
from tests.helpers import assert_same_bits


class Attention(nn.Module):
    """As diffusers' attention modules: a processor, and a way to change it."""

    def __init__(self) -> None:
        super().__init__()
        self.processor = object()
        self.to_q, self.to_k, self.to_v = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def set_processor(self, processor: object) -> None:
        self.processor = processor

    def forward(self, x: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(self.to_q(x), self.to_k(x), self.to_v(x))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = Attention(), Attention(), nn.Linear(16, 16)

    def forward(self, sample: Tensor, timestep: float) -> Tensor:
        return self.out(self.second(self.first(sample)) + timestep / 1000)


def network() -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Network().eval()


X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))


def coarse(**patterns) -> AttentionConfig:
    return AttentionConfig(
        operands=QuantizerConfig(bits=2), softmax=QuantizerConfig(bits=2, symmetric=False, lowest="zero"), **patterns
    )


def test_removed_attention_computes_the_same_bits_as_before_and_a_copy_has_quantizers_of_its_own():
    model = network()
    with torch.no_grad():
        before = model(X, 5.0)
        assert apply_attention(model, coarse()) == ("first", "second")
        coded = model(X, 5.0)
        assert float((coded - before).abs().max()) > 1e-3
        quantized = copy.deepcopy(model)
        remove_attention(model)
        remove_attention(model)
        assert_same_bits(model(X, 5.0), before)
        assert_same_bits(quantized(X, 5.0), coded)
        remove_attention(quantized)
        assert_same_bits(quantized(X, 5.0), before)
    assert "_modiff_attention" not in model.__dict__
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_patterns_choose_the_modules_and_those_that_take_none_are_refused():
    model = network()
    for patterns in ({"include": ("third",)}, {"exclude": ("*",)}):
        with pytest.raises(ConfigError, match=r"expected (a pattern that matches|at least one attention module)"):
            apply_attention(model, coarse(**patterns))
    assert "_modiff_attention" not in model.__dict__
    assert apply_attention(model, coarse(include=("sec*",))) == ("second",)
    assert set(attention_quantizers(model)) == {"second.q", "second.k", "second.v", "second.softmax"}
    assert set(attention_modules(model, coarse(exclude=("second",)))) == {"first"}


def test_attention_that_peft_saves_a_copy_of_is_quantized_and_goes_again():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(network(), peft.LoraConfig(target_modules=["out"], modules_to_save=["second"]))
    with torch.no_grad():
        before = model(X, 5.0)
        modiff.apply(model, dataclasses.replace(modiff.presets.plain(None, 8), attention=coarse()))
        assert float((model(X, 5.0) - before).abs().max()) > 1e-3
        modiff.remove(model)
        assert_same_bits(model(X, 5.0), before)


def test_static_operands_are_calibrated_with_the_layers_and_per_step_scales_with_their_clock():
    model = network()
    modiff.apply(model, modiff.presets.plain(None, 8))
    static = QuantizerConfig(dynamic=False, step_groups=0)
    apply_attention(model, AttentionConfig(
        operands=static, softmax=dataclasses.replace(static, symmetric=False, lowest="zero")
    ))  # fmt: skip
    assert "first.to_q" not in attention_quantizers(model)
    assert {"second.to_q", "first.q", "second.softmax"} <= set(quantizers_of(model))

    def run() -> None:
        with torch.no_grad(), modiff.trajectory(model):
            for i, t in enumerate((900.0, 500.0, 100.0)):
                model(X * (1 + i), t)

    modiff.calibrate(model, run)
    quantizer = attention_quantizers(model)["first.v"]
    assert sorted(quantizer.moments) == [(100.0,), (500.0,), (900.0,)]
    with torch.no_grad():
        quantized = model.first.to_v
        for t, times in ((900.0, 1), (100.0, 3)):
            expected = float(quantized(X * times).abs().max()) / 127
            table = quantizer.tables[quantizer.moments[(t,)]]
            assert float(table[0].scale) == pytest.approx(expected, rel=1e-5)
        with pytest.raises(modiff.CalibrationError, match="got timestep 300"):
            model(X, 300.0)
