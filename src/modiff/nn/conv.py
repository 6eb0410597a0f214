"""The modulated convolutions: stride, padding and its modes, dilation and groups as in torch."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from modiff.errors import StateError
from modiff.nn.integer import Sliding
from modiff.nn.layer import ModulatedLayer


class _ModulatedConv(ModulatedLayer):
    channel_dim: ClassVar[int] = 1
    in_channels: int
    groups: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding_mode: str
    _reversed_padding_repeated_twice: list[int]

    def _geometry(self) -> tuple[int, int, tuple[int, ...]]:
        return self.in_channels, self.groups, self.kernel_size

    def sliding(self) -> Sliding:
        """Stride, padding and dilation, resolved."""
        if self.padding_mode != "zeros":
            return Sliding(unsupported=f"no kernel pads with {self.padding_mode!r}")
        pads = self._reversed_padding_repeated_twice  # (left, right) of each axis, the last axis first
        before, after = pads[0::2][::-1], pads[1::2][::-1]
        if before != after:
            return Sliding(unsupported="no kernel pads one side more than the other")
        return Sliding(self.stride, tuple(before), self.dilation)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output for `x`. Raises StateError as every modulated layer does, and without a batch axis."""
        if x.dim() != len(self.kernel_size) + 2:
            raise StateError(
                f"{self.name}: expected {len(self.kernel_size) + 2} axes (batch, channels, ...), got {tuple(x.shape)}. "
                "Scales and states belong to the samples of a batch. Add the batch axis with x[None]."
            )
        return super().forward(x)


class ModulatedConv1d(_ModulatedConv, nn.Conv1d):
    """`nn.Conv1d` on coded residuals, ô_t = ô_{t+1} + W * q_t: (N, C, L) -> (N, O, L')."""

    def operator(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution with this layer's stride, padding, dilation and groups."""
        return nn.Conv1d._conv_forward(self, x, weight, bias)


class ModulatedConv2d(_ModulatedConv, nn.Conv2d):
    """`nn.Conv2d` on coded residuals, ô_t = ô_{t+1} + W * q_t: (N, C, H, W) -> (N, O, H', W')."""

    def operator(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution with this layer's stride, padding, dilation and groups."""
        return nn.Conv2d._conv_forward(self, x, weight, bias)


class ModulatedConv3d(_ModulatedConv, nn.Conv3d):
    """`nn.Conv3d` on coded residuals, ô_t = ô_{t+1} + W * q_t: (N, C, D, H, W) -> (N, O, D', H', W')."""

    def operator(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution with this layer's stride, padding, dilation and groups."""
        return nn.Conv3d._conv_forward(self, x, weight, bias)
