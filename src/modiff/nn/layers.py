"""The layers that are quantized, and which torch layer each takes the place of."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

from torch import nn
from torch.nn import functional

from modiff.config import LayerConfig
from modiff.nn.layer import ModulatedLayer
from modiff.nn.operator import LayerSpec


class ModulatedLinear(ModulatedLayer, nn.Linear):
    """`nn.Linear` on codes of residuals, ô_t = ô_{t+1} + W q_t: (*, in_features) -> (*, out_features)."""

    channel_dim: ClassVar[int] = -1

    def spec_of(self, name: str, config: LayerConfig, split: int | None) -> LayerSpec:
        """Geometry, config and name."""
        return LayerSpec(name, config, self.in_features, self.channel_dim, functional.linear, split)


class _ModulatedConv(ModulatedLayer):
    channel_dim: ClassVar[int] = 1

    def spec_of(self: Any, name: str, config: LayerConfig, split: int | None) -> LayerSpec:
        """Geometry, with padding resolved, config and name."""
        pads = self._reversed_padding_repeated_twice  # (left, right) of each axis, the last axis first
        left, right = pads[0::2][::-1], pads[1::2][::-1]
        unsupported = "" if left == right else "no kernel pads one side more than the other"
        operate = functools.partial(
            getattr(functional, f"conv{len(self.kernel_size)}d"), stride=self.stride, padding=self.padding,
            dilation=self.dilation, groups=self.groups,
        )  # fmt: skip
        if self.padding_mode != "zeros":
            operate, unsupported = self._conv_forward, f"no kernel pads with {self.padding_mode!r}"
        return LayerSpec(
            name, config, self.in_channels, self.channel_dim, operate, split, self.groups, self.kernel_size,
            self.stride, tuple(left), self.dilation, unsupported,
        )  # fmt: skip


class ModulatedConv1d(_ModulatedConv, nn.Conv1d):
    """`nn.Conv1d` on codes of residuals, ô_t = ô_{t+1} + W * q_t: (N, C, L) -> (N, O, L')."""


class ModulatedConv2d(_ModulatedConv, nn.Conv2d):
    """`nn.Conv2d` on codes of residuals, ô_t = ô_{t+1} + W * q_t: (N, C, H, W) -> (N, O, H', W')."""


class ModulatedConv3d(_ModulatedConv, nn.Conv3d):
    """`nn.Conv3d` on codes of residuals, ô_t = ô_{t+1} + W * q_t: (N, C, D, H, W) -> (N, O, D', H', W')."""


QUANTIZED_CLASSES: dict[type[nn.Module], type[ModulatedLayer]] = {
    nn.Linear: ModulatedLinear,
    nn.Conv1d: ModulatedConv1d,
    nn.Conv2d: ModulatedConv2d,
    nn.Conv3d: ModulatedConv3d,
}
"""A new layer class enters here, with `spec_of` in its class."""


def quantized_class(layer: nn.Module) -> type[ModulatedLayer] | None:
    """The modulated class for a layer; subclasses count when they keep the torch layer's own forward."""
    for kind, quantized in QUANTIZED_CLASSES.items():
        if isinstance(layer, kind) and type(layer).forward is kind.forward:
            return quantized
    return None
