"""The modulated linear layer."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional

from modiff.nn.integer import Sliding
from modiff.nn.layer import ModulatedLayer


class ModulatedLinear(ModulatedLayer, nn.Linear):
    """`nn.Linear` on coded residuals, ô_t = ô_{t+1} + W q_t: (*, in_features) -> (*, out_features)."""

    channel_dim: ClassVar[int] = -1

    def _geometry(self) -> tuple[int, int, tuple[int, ...]]:
        return self.in_features, 1, ()

    def sliding(self) -> Sliding:
        """None."""
        return Sliding()

    def operator(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + b."""
        return functional.linear(x, weight, bias)
