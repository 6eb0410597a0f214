"""Quantized operands in diffusers' attention modules."""

from __future__ import annotations

import pytest

import modiff
from modiff import AttentionConfig, QuantizerConfig, StateError
from modiff.model.attention import apply_attention, attention_quantizers, remove_attention
from tests.helpers import assert_same_bits, relative_error
from tests.hosts.tiny import HOSTS


def config(bits: int | None) -> AttentionConfig:
    return AttentionConfig(
        operands=QuantizerConfig(bits=bits), softmax=QuantizerConfig(bits=bits, symmetric=False, lowest="zero")
    )


@pytest.mark.parametrize("name", ["sd", "sd3", "flux", "wan"])
def test_a_host_runs_with_quantized_attention_beneath_modulated_layers_and_comes_back_to_the_bit(name):
    host = HOSTS[name]
    pipe = host.build()
    model = host.network(pipe)
    plain = host.call(pipe, steps=2)
    apply_attention(model, config(None))
    assert_same_bits(host.call(pipe, steps=2), plain)
    remove_attention(model)
    modiff.apply(pipe, modiff.presets.modulated(None, 8))
    modulated = host.call(pipe, steps=2)
    errors = []
    for bits in (8, 2):
        taken = apply_attention(model, config(bits))
        assert len(attention_quantizers(model)) == 4 * len(taken) > 0
        errors.append(relative_error(host.call(pipe, steps=2), modulated))
        remove_attention(model)
    assert 0 < errors[0] < 0.03
    assert errors[1] > 5 * errors[0]
    assert_same_bits(host.call(pipe, steps=2), modulated)


def test_a_processor_that_computes_attention_by_itself_is_an_relative_error():
    from diffusers.models.attention_processor import AttnProcessor

    pipe = HOSTS["sd"].build()
    pipe.unet.set_attn_processor(AttnProcessor())
    apply_attention(pipe.unet, config(8))
    with pytest.raises(StateError, match="expected a call of torch's scaled_dot_product_attention, got none"):
        HOSTS["sd"].call(pipe, steps=1)
