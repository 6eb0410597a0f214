"""Layers without states: full precision to the bit, plain quantization to the bit, gradients through the rounding."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

import modiff
from modiff import AttentionConfig, LayerConfig, ModiffConfig, QuantizerConfig, StateError, WeightConfig, presets
from modiff.calibration.reconstruct.layers import Through, evaluating, full_precision, without_states
from modiff.core.affine import QParams
from modiff.model.attach import attachment_of
from modiff.model.attention import attention_quantizers
from tests.helpers import assert_same_bits, assert_within
from tests.hosts.tiny import HOSTS
from tests.model.toys import sample, toy, toy_unet

ROTATED = LayerConfig(weight=WeightConfig(bits=4), activation=QuantizerConfig(bits=4), rotation="hadamard")


def plain(layer: LayerConfig, **settings) -> ModiffConfig:
    return ModiffConfig(layer=dataclasses.replace(layer, modulation=None), **settings)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("build", "config"),
    [
        (toy, presets.w4a4()),
        (toy_unet, presets.tuned(4, 4)),
        (toy, plain(ROTATED)),
        (toy_unet, plain(ROTATED)),
        (toy_unet, plain(LayerConfig(activation=QuantizerConfig(bits=3, clip=0.6, symmetric=False)))),
    ],
)
def test_full_precision_is_the_network_without_modiff_and_without_states_plain_layers_compute_as_ever(build, config):
    model, exact = build(), sample(build())
    modiff.apply(model, config)
    with full_precision(model):
        found = sample(model)
    for a, b in zip(found, exact, strict=True):
        assert_same_bits(a, b)
    with modiff.trajectory(model):
        quantized = sample(model)
    assert not torch.equal(quantized[-1], exact[-1])
    if config.layer.modulation is None:
        with without_states(model, "quantized"):
            for a, b in zip(sample(model), quantized, strict=True):
                assert_within(a.detach(), b, 1e-6 * float(b.abs().max()))


@pytest.mark.parametrize("name", ["ddim", "flux"])
def test_the_attention_of_a_host_is_in_full_precision_or_quantized_as_ever_with_gradients(name):
    host = HOSTS[name]
    exact, pipe = host.call(host.build()), host.build()
    modiff.apply(pipe, dataclasses.replace(plain(ROTATED), attention=AttentionConfig()))
    expected, model = host.call(pipe), getattr(pipe, host.denoiser)
    with full_precision(model):
        assert_same_bits(host.call(pipe), exact)
    with without_states(model, "quantized"):
        assert all(isinstance(q, Through) for q in attention_quantizers(model).values())
        assert_within(host.call(pipe), expected, 2e-5)
    assert_same_bits(host.call(pipe), expected)
    assert not torch.equal(expected, exact)
    if name == "ddim":
        modiff.remove(pipe)
        modiff.apply(pipe, dataclasses.replace(presets.plain(8, 8), attention=AttentionConfig()))
        quantized, plainly = gradients(model, model.mid_block.attentions[0], 2, 64, 2, 2)
        assert float((quantized - plainly).norm()) < 0.05 * float(plainly.norm())


@pytest.mark.parametrize("static", [False, True])
def test_modulated_layers_quantize_their_values_with_fresh_scales_without_a_trajectory(static):
    """As plain quantization of the same config does; static scales would be those of their residuals."""
    activation = QuantizerConfig(bits=4, dynamic=not static)
    model, plainly = toy(), toy()
    modiff.apply(model, ModiffConfig(layer=LayerConfig(weight=WeightConfig(bits=4), activation=activation)))
    for quantized in attachment_of(model).layers.values() if static else ():
        quantized.quantizer.static = (QParams(torch.tensor(1e-4), None),)
    fresh = QuantizerConfig(bits=4, granularity="tensor" if static else "auto")
    modiff.apply(plainly, plain(LayerConfig(weight=WeightConfig(bits=4), activation=fresh), share_residuals="off"))
    weights_only = toy()
    modiff.apply(weights_only, presets.plain(4, None))
    for activations, other in (("quantized", plainly), ("full_precision", weights_only)):
        with without_states(model, activations):
            for a, b in zip(sample(model), sample(other), strict=True):
                assert_within(a.detach(), b, 1e-5)


def gradients(model: nn.Module, module: nn.Module, *shape: int) -> list[Tensor]:
    """Of one weighted sum of outputs: with quantized activations, and without."""
    x, weights = drawn(1, *shape).requires_grad_(), drawn(2, *shape)
    both = []
    for activations in ("quantized", "full_precision"):
        with without_states(model, activations):
            both += torch.autograd.grad((module(x) * weights).sum(), [x])
    return both


@pytest.mark.parametrize(("groups", "rotation"), [(1, "hadamard"), (2, "none")])
def test_gradients_pass_to_the_input_where_codes_do_not_saturate(groups, rotation):
    """Straight through: the gradient of a layer with quantized input is that of its operator alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=groups))
    modiff.apply(model, plain(dataclasses.replace(ROTATED, rotation=rotation), first_last="quantize"))
    assert_within(*gradients(model, model, 2, 8, 4, 4), 1e-5)


def test_layers_are_themselves_again_also_when_the_body_raises_and_dropout_is_off_meanwhile():
    model = toy()
    modiff.apply(model, presets.w4a4())
    model.train()
    model.norm.eval()
    for context in (full_precision(model), without_states(model, "quantized"), evaluating(model)):
        with pytest.raises(KeyboardInterrupt), context:
            raise KeyboardInterrupt
    assert not any("forward" in quantized.__dict__ for quantized in attachment_of(model).layers.values())
    assert (model.training, model.norm.training, model.attention.to_q.training) == (True, False, True)
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    with pytest.raises(StateError, match="expected a running trajectory"):
        sample(model)
    quantized = attachment_of(model).layers["attention.to_k"]  # a forward that another library replaced is not lost
    theirs = quantized.__dict__["forward"] = type(quantized).forward.__get__(quantized)
    with pytest.raises(StateError, match=r"to_k: expected a layer with its own forward"), full_precision(model):
        pass
    assert quantized.__dict__["forward"] is theirs
    assert "forward" not in attachment_of(model).layers["body"].__dict__
