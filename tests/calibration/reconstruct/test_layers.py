"""Layers without states: full precision to the bit, plain quantization to the bit, gradients through the rounding."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

import modiff
from modiff import AttentionConfig, LayerConfig, ModiffConfig, QuantizerConfig, StateError, WeightConfig, presets
from modiff.calibration.reconstruct.layers import attention_through, evaluating, full_precision, without_states
from modiff.core.affine import QParams
from modiff.model.attach import attachment_of
from tests.helpers import assert_same_bits, assert_within
from tests.hosts.tiny import HOSTS
from tests.model.toys import sample, toy, toy_unet

ROTATED = LayerConfig(weight=WeightConfig(bits=4), activation=QuantizerConfig(bits=4), rotation="hadamard")


def plain(layer: LayerConfig, **settings) -> ModiffConfig:
    return ModiffConfig(layer=dataclasses.replace(layer, modulation=None), **settings)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("build", [toy, toy_unet])
@pytest.mark.parametrize("config", [presets.w4a4(), presets.tuned(4, 4), plain(ROTATED)])
def test_full_precision_is_the_network_without_modiff(build, config):
    model, exact = build(), sample(build())
    modiff.apply(model, config)
    with full_precision(model):
        found = sample(model)
    for a, b in zip(found, exact, strict=True):
        assert_same_bits(a, b)
    with modiff.trajectory(model):
        assert not torch.equal(sample(model)[-1], exact[-1])


@pytest.mark.parametrize("name", ["ddim", "sd", "flux"])
def test_full_precision_reaches_the_attention_of_a_host(name):
    host = HOSTS[name]
    exact = host.call(host.build())
    pipe = host.build()
    modiff.apply(pipe, dataclasses.replace(presets.w4a4(), attention=AttentionConfig()))
    with full_precision(getattr(pipe, host.denoiser)):
        assert_same_bits(host.call(pipe), exact)
    assert not torch.equal(host.call(pipe), exact)


@pytest.mark.parametrize("activations", [QuantizerConfig(bits=4), QuantizerConfig(bits=3, clip=0.6, symmetric=False)])
@pytest.mark.parametrize("rotation", ["none", "hadamard"])
@pytest.mark.parametrize("build", [toy, toy_unet])
def test_without_states_plain_layers_compute_as_ever(build, rotation, activations):
    layer = dataclasses.replace(ROTATED, rotation=rotation, activation=activations)
    model = build()
    modiff.apply(model, plain(layer))
    expected = sample(model)
    with without_states(model, "quantized"):
        found = sample(model)
    for a, b in zip(found, expected, strict=True):
        assert_within(a.detach(), b, 1e-6 * float(b.abs().max()))


def test_without_states_attention_is_coded_as_ever():
    host = HOSTS["ddim"]
    pipe = host.build()
    modiff.apply(pipe, dataclasses.replace(plain(ROTATED), attention=AttentionConfig()))
    expected = host.call(pipe)
    model = pipe.unet
    with without_states(model, "quantized"):
        assert attention_through(model)
        found = host.call(pipe)
    assert_within(found, expected, 2e-5)
    assert attention_through(model) == {}
    assert_same_bits(host.call(pipe), expected)


def test_modulated_layers_are_coded_from_nothing_without_a_trajectory():
    """What a modulated layer would do at a step whose prediction is zero: plain quantization of the same config."""
    modulated, plainly = toy(), toy()
    modiff.apply(modulated, presets.w4a4())
    modiff.apply(plainly, plain(presets.w4a4().layer, share_residuals="off"))
    with without_states(modulated, "quantized"):
        found = sample(modulated)
    for a, b in zip(found, sample(plainly), strict=True):
        assert_within(a.detach(), b, 1e-5)


def test_values_of_modulated_layers_are_not_coded_with_the_scales_of_their_residuals():
    static = QuantizerConfig(bits=4, dynamic=False)
    model, plainly = toy(), toy()
    modiff.apply(model, ModiffConfig(layer=LayerConfig(activation=static)))
    for quantized in attachment_of(model).layers.values():
        quantized.quantizer.static = (QParams(torch.tensor(1e-4), None),)
    fresh = LayerConfig(activation=QuantizerConfig(bits=4, granularity="tensor"))
    modiff.apply(plainly, plain(fresh, share_residuals="off"))
    with without_states(model, "quantized"):
        found = sample(model)
    for a, b in zip(found, sample(plainly), strict=True):
        assert_within(a.detach(), b, 1e-5)


def test_with_activations_in_full_precision_only_the_weights_are_quantized():
    model, weights_only = toy_unet(), toy_unet()
    modiff.apply(model, presets.w4a4())
    modiff.apply(weights_only, presets.plain(4, None))
    with without_states(model, "full_precision"):
        found = sample(model)
    for a, b in zip(found, sample(weights_only), strict=True):
        assert_within(a.detach(), b, 1e-5)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("rotation", ["none", "hadamard"])
def test_gradients_pass_to_the_input_where_codes_do_not_saturate(groups, rotation):
    """Straight through: the gradient of a layer with coded input is that of its operator alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=groups))
    modiff.apply(model, plain(dataclasses.replace(ROTATED, rotation=rotation), first_last="quantize"))
    x, weights = drawn(1, 2, 8, 4, 4).requires_grad_(), drawn(2, 2, 8, 4, 4)
    gradients = []
    for activations in ("quantized", "full_precision"):
        with without_states(model, activations):
            gradients += torch.autograd.grad((model(x) * weights).sum(), [x])
    assert_within(gradients[0], gradients[1], 1e-5)


def test_gradients_pass_through_coded_attention():
    host = HOSTS["ddim"]
    pipe = host.build()
    modiff.apply(pipe, dataclasses.replace(presets.plain(8, 8), attention=AttentionConfig()))
    block = pipe.unet.mid_block.attentions[0]
    x, weights = drawn(1, 2, 64, 2, 2).requires_grad_(), drawn(2, 2, 64, 2, 2)
    gradients = []
    for activations in ("quantized", "full_precision"):
        with without_states(pipe.unet, activations):
            gradients += torch.autograd.grad((block(x) * weights).sum(), [x])
    assert float((gradients[0] - gradients[1]).norm()) < 0.05 * float(gradients[1].norm())


def test_layers_are_themselves_again_also_when_the_body_raises():
    model = toy()
    modiff.apply(model, presets.w4a4())
    for context in (full_precision(model), without_states(model, "quantized")):
        with pytest.raises(KeyboardInterrupt), context:
            raise KeyboardInterrupt
    assert not any("forward" in quantized.__dict__ for quantized in attachment_of(model).layers.values())
    with pytest.raises(StateError, match="expected a running trajectory"):
        sample(model)


def test_a_forward_that_another_library_replaced_is_not_lost():
    model = toy()
    modiff.apply(model, presets.w4a4())
    quantized = attachment_of(model).layers["attention.to_k"]
    theirs = quantized.__dict__["forward"] = type(quantized).forward.__get__(quantized)
    with (
        pytest.raises(StateError, match=r"attention\.to_k: expected a layer with its own forward"),
        full_precision(model),
    ):
        pass
    assert quantized.__dict__["forward"] is theirs
    assert "forward" not in attachment_of(model).layers["body"].__dict__


def test_dropout_is_off_while_learning_and_on_after():
    model = toy()
    model.train()
    model.norm.eval()
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    assert model.training
    assert not model.norm.training
    assert model.attention.to_q.training
