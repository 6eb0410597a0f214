"""Outliers: channels that dwarf the others are named, large layers and dead channels are not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from modiff.model.outliers import ChannelMaxima

CONV, LINEAR = nn.Conv2d(8, 4, 3), nn.Linear(8, 4)


def test_a_channel_that_dwarfs_its_layer_is_named_with_advice_and_large_layers_or_dead_channels_are_not() -> None:
    seen = ChannelMaxima()
    torch.manual_seed(0)
    for name, layer, shape in (("a", LINEAR, (5, 8)), ("b", CONV, (2, 8, 5, 5)), ("large", LINEAR, (5, 8))):
        seen.see(name, layer, torch.randn(shape) * (1e8 if name == "large" else 1))
    dead, jumping = torch.zeros(5, 8), torch.randn(2, 8, 5, 5)
    dead[:, 0] = 3
    jumping[0, 2] *= 1e9
    seen.see("dead", LINEAR, dead)
    seen.see("shortcut", CONV, torch.ones(2, 8, 5, 5))
    assert seen.outliers() == []
    seen.see("shortcut", CONV, jumping)  # one of many steps is enough
    (outlier,) = seen.outliers()
    assert (outlier.name, outlier.channels) == ("shortcut", 1)
    assert outlier.largest == jumping.abs().max()
    assert outlier.median == pytest.approx(float(jumping.abs().amax((0, 2, 3)).clamp(min=1).median()))
    assert "exclude=('shortcut',)" in str(outlier)
