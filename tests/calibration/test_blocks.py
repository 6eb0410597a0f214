"""Units of reconstruction: every layer in exactly one, the outermost match wins, learned in the order of execution."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

import modiff
from modiff import ConfigError, presets
from modiff.calibration.blocks import blocks_of
from modiff.model.attach import attachment_of
from tests.model.toys import toy, toy_unet


class Nested(nn.Module):
    """A block in a block, whose second layer runs first."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Linear(4, 4)
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.early = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.late(self.inner(self.inner(self.early(x))))


def nested() -> nn.Module:
    return nn.Sequential(OrderedDict(block=Nested(), last=nn.Linear(4, 4)))


def test_a_pattern_of_the_user_goes_before_the_known_blocks():
    found = blocks_of(nested(), kinds=("Nested",), patterns=("block.inner",))
    assert {b.name: b.layers for b in found} == {
        "block": ("block.late", "block.early", "block.unused"),
        "block.inner": ("block.inner.0", "block.inner.1"),
        "last": ("last",),
    }
    everything = blocks_of(nested(), kinds=("Nested",), patterns=("*.inner", "block"))
    assert [(b.name, b.kind, b.calls) for b in everything] == [("block", "Nested", None), ("last", "Linear", None)]
    with pytest.raises(ConfigError, match="blocks: expected patterns that match a module with layers to learn, got 'n"):
        blocks_of(nested(), patterns=("norm",))


def test_units_come_in_the_order_of_execution_and_say_how_often_they_run():
    model = nested()
    found = blocks_of(model, run=lambda: model(torch.randn(2, 4)))
    order = ["block.early", "block.inner.0", "block.inner.1", "block.late", "last", "block.unused"]
    assert [(b.name, b.calls) for b in found] == list(zip(order, [1, 2, 2, 1, 1, 0], strict=True))
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("kinds", [(), ("ResidualBlock",), ("Block",), ("ToyUNet", "*")])
def test_every_modulated_layer_is_in_exactly_one_unit(kinds):
    model = toy_unet()
    modiff.apply(model, presets.w4a8())
    plain = [name for name, m in toy_unet().named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    for network, layers in ((model, attachment_of(model).layers), (toy_unet(), plain)):
        assert sorted(n for block in blocks_of(network, kinds=kinds) for n in block.layers) == sorted(layers)
    some = blocks_of(toy(), kinds=("Attention",), layers=["attention.to_v", "body"])
    assert [(b.name, b.layers) for b in some] == [("attention", ("attention.to_v",)), ("body", ("body",))]
