"""A layer class from outside of the package: a linear layer that scales its input."""

import copy
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

import modiff
from modiff.config import LayerConfig
from modiff.nn import QUANTIZED_CLASSES, ModulatedLayer
from modiff.nn.operator import LayerSpec
from tests.helpers import assert_same_bits, assert_within, drifting


def scaled(x, weight, bias):
    return functional.linear(2 * x, weight, bias)


class Scaled(nn.Linear):
    """y = 2 x W^T + b."""

    def forward(self, x):
        return scaled(x, self.weight, self.bias)


class ModulatedScaled(ModulatedLayer, Scaled):
    """`Scaled` on codes of residuals."""

    channel_dim: ClassVar[int] = -1

    def spec_of(self, name, config, split):
        return LayerSpec(name, config, self.in_features, -1, scaled, split, unsupported="no kernel scales its input")


QUANTIZED_CLASSES[Scaled] = ModulatedScaled


def test_it_follows_its_float_layer_keeps_the_law_and_refuses_integers():
    torch.manual_seed(0)
    model = nn.Sequential(Scaled(16, 8), nn.ReLU(), nn.Linear(8, 4))
    plain = copy.deepcopy(model)
    layer = LayerConfig(execution="integer", rotation="hadamard")
    modiff.apply(model, modiff.ModiffConfig(layer=layer, min_weights=0, first_last="quantize"))
    assert isinstance(model[0], ModulatedScaled)
    assert (model[0].on_integers, model[0].unsupported) == (False, "no kernel scales its input")
    assert model[2].on_integers
    with torch.no_grad(), modiff.trajectory(model):
        outputs = [(model(x), plain(x)) for x in drifting(0, (3, 16), 5, 0.1, torch.float32)]
    for ours, theirs in outputs:
        assert_within(ours, theirs, 0.05)
    modiff.remove(model)
    x = torch.randn(3, 16)
    assert_same_bits(model(x), plain(x))
