"""Layers whose input has channels that dwarf the others: a scale that fits these rounds all others to zero."""

from __future__ import annotations

import statistics
from typing import NamedTuple

import torch
from torch import Tensor, nn

from modiff.nn import quantized_class

RATIO = 1000.0
"""Of the largest channel to the median one, above which a layer is named: at 8 bits, 254 leaves half a code."""


class Outlier(NamedTuple):
    """A layer, its largest |x|, the median over its channels of their largest |x|, and how many channels dwarf that."""

    name: str
    largest: float
    median: float
    channels: int

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.channels} input channels reach {self.largest:.2g}, the median channel "
            f"{self.median:.2g}: one scale for both rounds the others to zero. Leave the layer, "
            f"exclude=({self.name!r},), or split a concatenated input with `Host.splits`."
        )


class ChannelMaxima:
    """The largest magnitude of each input channel of each layer, over all inputs that were seen."""

    def __init__(self) -> None:
        self._maxima: dict[str, Tensor] = {}

    def see(self, name: str, layer: nn.Module, x: Tensor) -> None:
        """The Linear or Conv layer of that name read x. Cost: one pass over it."""
        kind = quantized_class(layer)
        largest = x.detach().abs().movedim(-1 if kind is None else kind.channel_dim, 0).flatten(1).amax(1).float()
        self._maxima[name] = torch.maximum(largest, self._maxima.get(name, largest))

    def outliers(self) -> list[Outlier]:
        """Layers with a channel `RATIO` times as large as their own median one and as the median layer's."""
        medians = {name: float(maxima.median()) for name, maxima in self._maxima.items()}
        typical = statistics.median(medians.values()) if medians else 0.0
        outliers: list[Outlier] = []
        for name, maxima in self._maxima.items():
            if above := int((maxima > RATIO * max(medians[name], typical)).sum()):
                outliers.append(Outlier(name, float(maxima.max()), medians[name], above))
        return sorted(outliers, key=lambda outlier: -outlier.largest)
