"""Networks of a layer or two and loops that drive them, for tests that watch layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from modiff.config import LayerConfig, ModiffConfig
from tests.recipes import randomised


class OneLayer(nn.Module):
    """A network that is one layer, called `times` times in each evaluation."""

    def __init__(self, layer: nn.Module, times: int = 1) -> None:
        super().__init__()
        self.layer, self.times = randomised(layer), times

    def forward(self, x: Tensor, timestep: float) -> Tensor:
        for _ in range(self.times):
            x = self.layer(x)
        return x


def only_layer(config: LayerConfig) -> ModiffConfig:
    """Takes the layer of OneLayer, small and first and last as it is."""
    return ModiffConfig(layer=config, include=("layer",))


def driven(
    network: nn.Module, inputs: Sequence[Tensor], timesteps: Sequence[float] | None = None
) -> Callable[[], None]:
    """Evaluates the network on each input in turn."""

    @torch.no_grad()
    def run() -> None:
        for x, t in zip(inputs, timesteps or range(len(inputs)), strict=True):
            network(x, float(t))

    return run
