"""A granularity from outside of the package: a scale for each group of channels."""

import pytest
import torch
from torch import nn

import modiff
from modiff import ConfigError, Granularity, LayerConfig, ModiffConfig, QuantizerConfig
from tests.recipes import state_of


class ChannelGroups(Granularity):
    """One scale for every `size` channels that lie next to each other, in all samples and tokens."""

    def __init__(self, size):
        self.size = size

    def reduce(self, x, channel_dim, extreme):
        groups = x.movedim(channel_dim, -1).unflatten(-1, (-1, self.size))
        each = extreme(groups, (*range(x.dim() - 1), x.dim()), keepdim=True)
        return each.expand(*each.shape[:-1], self.size).flatten(-2).movedim(-1, channel_dim)


modiff.register_granularity("groups of 4", ChannelGroups(4))


def config(execution: str = "simulated", **activation: object) -> ModiffConfig:
    quantizer = QuantizerConfig(**{"bits": 4, "granularity": "groups of 4", **activation})
    return ModiffConfig(layer=LayerConfig(activation=quantizer, execution=execution), min_weights=0,
                        first_last="quantize")  # fmt: skip


@pytest.mark.parametrize(("layer", "shape"), [(nn.Linear(8, 8), (3, 2, 8)), (nn.Conv2d(8, 8, 3), (3, 8, 5, 5))])
def test_each_group_has_a_scale_of_its_own(layer, shape):
    model = nn.Sequential(layer)
    modiff.apply(model, config())
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    channels = [1, -1][isinstance(layer, nn.Linear)]
    size = torch.tensor([1.0, 100.0]).repeat_interleave(4).reshape(8 if channels == -1 else (8, 1, 1))
    with torch.no_grad(), modiff.trajectory(model):
        model(torch.zeros(shape))
        model(x * size)
        error = (state_of(model[0]).input - x * size).abs() / size
    for group in error.split(4, channels):
        assert float(group.max()) <= float(x.abs().max()) / 7 / 2 * 1.001  # half a step of its own scale


def test_integers_refuse_it_and_so_do_static_scales():
    model = nn.Sequential(nn.Linear(8, 8))
    modiff.apply(model, config("integer"))
    assert (model[0].on_integers, model[0].unsupported) == (False, "no kernel knows its granularity")
    with pytest.raises(ConfigError, match=r"expected one whose scales can be measured before, got 'groups of 4'"):
        modiff.apply(nn.Sequential(nn.Linear(8, 8)), config(dynamic=False))
