"""The layers that are quantized, and which torch layer each takes the place of."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from modiff.config import LayerConfig
from modiff.errors import StateError
from modiff.nn.layer import ModulatedLayer
from modiff.nn.operator import LayerSpec, evaluated
from modiff.nn.weight import turned


class ModulatedLinear(ModulatedLayer, nn.Linear):
    """`nn.Linear` on codes of residuals, ô_t = ô_{t+1} + W q_t: (*, in_features) -> (*, out_features)."""

    channel_dim: ClassVar[int] = -1

    def spec_of(self, name: str, config: LayerConfig, split: int | None) -> LayerSpec:
        """Geometry, config and name."""
        return LayerSpec(name, config, self.in_features, -1, functional.linear, split)


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
            name, config, self.in_channels, 1, operate, split, self.groups, self.kernel_size,
            self.stride, tuple(left), self.dilation, unsupported,
        )  # fmt: skip


class ModulatedConv1d(_ModulatedConv, nn.Conv1d):
    """`nn.Conv1d` on codes of residuals, ô_t = ô_{t+1} + W * q_t: (N, C, L) -> (N, O, L')."""


class ModulatedConv2d(_ModulatedConv, nn.Conv2d):
    """`nn.Conv2d` on codes of residuals, ô_t = ô_{t+1} + W * q_t: (N, C, H, W) -> (N, O, H', W')."""


class ModulatedConv3d(_ModulatedConv, nn.Conv3d):
    """`nn.Conv3d` on codes of residuals, ô_t = ô_{t+1} + W * q_t: (N, C, D, H, W) -> (N, O, D', H', W')."""


class _ModulatedTransposed(ModulatedLayer):
    channel_dim: ClassVar[int] = 1

    def spec_of(self: Any, name: str, config: LayerConfig, split: int | None) -> LayerSpec:
        """Geometry, config and name."""
        operate = functools.partial(_ModulatedTransposed.operate, self)
        return LayerSpec(
            name, config, self.in_channels, 1, operate, split, self.groups, self.kernel_size, self.stride, self.padding,
            self.dilation, "no kernel is a transposed convolution", self.groups,
        )  # fmt: skip

    def operate(self: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's own computation with a weight (O, I / groups, ...)."""
        axes, size = len(self.kernel_size), self.__dict__.get("output_size")
        extra = self._output_padding(x, size, self.stride, self.padding, self.kernel_size, axes, self.dilation)
        convolve, weight = getattr(functional, f"conv_transpose{axes}d"), turned(weight, self.groups)
        return convolve(x, weight, bias, self.stride, self.padding, extra, self.groups, self.dilation)

    def forward(self: Any, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """As `ModulatedLayer.forward`. Raises: StateError also for an output size in a graph."""
        if not torch.compiler.is_compiling():
            self.__dict__["output_size"] = output_size
        elif output_size is not None:
            raise StateError(f"{self.name}: expected no output size in a graph of torch.compile, got {output_size}. "
                             "The graph keeps none. Set the layer's output_padding.")  # fmt: skip
        return super().forward(input)


class ModulatedConvTranspose1d(_ModulatedTransposed, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` on codes of residuals: (N, C, L) -> (N, O, L')."""


class ModulatedConvTranspose2d(_ModulatedTransposed, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` on codes of residuals: (N, C, H, W) -> (N, O, H', W')."""


class ModulatedConvTranspose3d(_ModulatedTransposed, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` on codes of residuals: (N, C, D, H, W) -> (N, O, D', H', W')."""


QUANTIZED_CLASSES: dict[type[nn.Module], type[ModulatedLayer]] = {
    nn.Linear: ModulatedLinear,
    nn.Conv1d: ModulatedConv1d,
    nn.Conv2d: ModulatedConv2d,
    nn.Conv3d: ModulatedConv3d,
    nn.ConvTranspose1d: ModulatedConvTranspose1d,
    nn.ConvTranspose2d: ModulatedConvTranspose2d,
    nn.ConvTranspose3d: ModulatedConvTranspose3d,
}
"""A new layer class enters here, with `spec_of` in its class."""


def quantized_class(layer: nn.Module) -> type[ModulatedLayer] | None:
    """The modulated class of the torch layer whose computation a layer's forward is, whatever makes its weight."""
    kinds = {} if isinstance(layer, ModulatedLayer) else QUANTIZED_CLASSES
    classes = [quantized for kind, quantized in kinds.items() if isinstance(layer, kind)]
    made = (each for each in classes if evaluated(layer, each.spec_of(layer, "layer", LayerConfig(), None)))
    return next((each for each in classes if each.keeps(layer)), None) or next(made, None)
