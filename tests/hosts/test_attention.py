"""Attention operands in diffusers' own attention modules."""

from __future__ import annotations

import pytest
import torch

import modiff
from modiff import AttentionConfig, QuantizerConfig, StateError
from modiff.model.attention import apply_attention, attention_quantizers, remove_attention
from tests.helpers import assert_same_bits
from tests.hosts.tiny import HOSTS

NAMES = ["ddim", "dit", "sd3", "flux"]


def config(bits: int | None) -> AttentionConfig:
    return AttentionConfig(
        operands=QuantizerConfig(bits=bits), softmax=QuantizerConfig(bits=bits, symmetric=False, lowest="zero")
    )


def error(mine: torch.Tensor, true: torch.Tensor) -> float:
    return float((mine.double() - true.double()).norm() / true.double().norm())


@pytest.mark.parametrize("name", NAMES)
def test_every_host_runs_with_coded_attention_and_comes_back_to_the_bit(name):
    host = HOSTS[name]
    pipe = host.build()
    model = getattr(pipe, host.denoiser)
    plain = host.call(pipe, steps=2)
    taken = apply_attention(model, config(8))
    assert len(taken) >= 1
    assert len(attention_quantizers(model)) == 4 * len(taken)
    coded = host.call(pipe, steps=2)
    remove_attention(model)
    apply_attention(model, config(2))
    coarse = host.call(pipe, steps=2)
    remove_attention(model)
    assert 0 < error(coded, plain) < 0.02
    assert error(coarse, plain) > 5 * error(coded, plain)
    assert_same_bits(host.call(pipe, steps=2), plain)
    apply_attention(model, config(None))
    assert_same_bits(host.call(pipe, steps=2), plain)


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_coded_attention_and_modulated_layers_compose_in_both_kinds_of_guidance(name):
    host = HOSTS[name]
    pipe = host.build()
    model = getattr(pipe, host.denoiser)
    plain = host.call(pipe)
    modiff.apply(pipe, modiff.presets.modulated(None, 8))
    modulated = host.call(pipe)
    apply_attention(model, config(8))
    both = host.call(pipe)
    assert 0 < error(both, modulated) < 0.03
    assert error(both, plain) < 0.06
    remove_attention(model)
    assert_same_bits(host.call(pipe), modulated)


def test_a_processor_that_computes_attention_by_itself_is_an_error():
    from diffusers.models.attention_processor import AttnProcessor

    pipe = HOSTS["sd"].build()
    pipe.unet.set_attn_processor(AttnProcessor())
    apply_attention(pipe.unet, config(8))
    with pytest.raises(StateError, match="expected a call of torch's scaled_dot_product_attention, got none"):
        HOSTS["sd"].call(pipe, steps=1)
