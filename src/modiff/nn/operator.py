"""A layer's geometry, config and name, and its affine map with the quantized weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from modiff.config import LayerConfig
from modiff.core.hadamard import Segment, segments_of
from modiff.core.quantizer import Code
from modiff.nn.weight import QuantizedWeight

_CONVOLVE = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}

Parameters = dict[str, Any]
"""The parameters of a module by name, the dictionary that the module itself keeps."""


@dataclass(frozen=True)
class LayerSpec:
    """A layer's geometry, config and name.

    channels: of the input. channel_dim: their axis in input and output, -1 or 1.
    operate: the torch layer's own computation, (x, weight, bias) -> output.
    split: channel index where the input is cut into two runs with a quantizer each.
    kernel_size, stride, padding, dilation: of a convolution; empty for a linear layer.
    unsupported: why no integer kernel moves over the input as this layer does.
    """

    name: str
    config: LayerConfig
    channels: int
    channel_dim: int
    operate: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    split: int | None = None
    groups: int = 1
    kernel_size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    unsupported: str = ""

    @cached_property
    def runs(self) -> tuple[int, ...]:
        """How many channels of the input each quantizer has."""
        return (self.channels,) if self.split is None else (self.split, self.channels - self.split)

    @cached_property
    def rotation(self) -> tuple[Segment, ...] | None:
        """Blocks in which the input is rotated, None where it is not."""
        if self.config.rotation == "none":
            return None
        return segments_of(self.runs, self.groups, self.config.rotation_block)

    @cached_property
    def anchors_exactly(self) -> bool:
        """Whether the config asks for the weight before rounding where the states start."""
        modulation = self.config.modulation
        if modulation is None or modulation.first_step == "coded" or self.config.activation.bits is None:
            return False
        return modulation.anchor_weights == "exact"


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str | int,
    dilation: tuple[int, ...],
    groups: int,
    mode: str,
    pads: list[int],
) -> Tensor:
    """(N, C, ...) -> (N, O, ...) with what a torch layer pads in front of it."""
    if mode != "zeros":
        x, padding = functional.pad(x, pads, mode=mode), 0
    return _CONVOLVE[len(stride)](x, weight, bias, stride, padding, dilation, groups)


class LayerOperator:
    """A(x) + b of one layer, with its quantized weight or the weight before rounding.

    parameters: of the layer; `weight` and `bias` are read at each use, as they may be replaced and moved.
    """

    def __init__(self, spec: LayerSpec, parameters: Parameters) -> None:
        self.spec, self.parameters = spec, parameters
        runs, rotation = spec.runs, spec.rotation
        if spec.split is None:
            runs = (spec.channels // spec.groups,)
            rotation = None if rotation is None else segments_of(runs, 1, rotation[0].block)
        self.quantized = QuantizedWeight(spec.config.weight, runs, rotation, f"{spec.name}.weight")

    @property
    def weight(self) -> Tensor:
        """The parameter: floats, or packed codes."""
        return self.parameters["weight"]

    @property
    def bias(self) -> Tensor | None:
        """The parameter."""
        return self.parameters["bias"]

    def affine(self, value: Tensor) -> Tensor:
        """A_q(value) + bias with the quantized, rotated weight."""
        return self._affine(value, self.quantized.dense(self.weight, value.dtype))

    def anchor(self, value: Tensor) -> Tensor:
        """A(value) + bias where the states start: with the rotated weight before rounding, or A_q by the config."""
        if not self.spec.anchors_exactly:
            return self.affine(value)
        return self._affine(value, self.quantized.exact(self.weight, value.dtype))

    def linear(self, code: Code) -> Tensor:
        """A_q(code) without bias."""
        value = code.value()
        return self.spec.operate(value, self.quantized.dense(self.parameters["weight"], value.dtype), None)

    def start(self) -> Tensor | float:
        """The bias, shaped to be added to an output."""
        bias = self.bias
        if bias is None:
            return 0.0
        trailing = 0 if self.spec.channel_dim == -1 else len(self.spec.kernel_size)
        return at_least_float32(bias.detach()).reshape(-1, *[1] * trailing)

    def _affine(self, value: Tensor, weight: Tensor) -> Tensor:
        bias = self.bias
        return self.spec.operate(value, weight, None if bias is None else bias.detach().to(value.dtype))


def at_least_float32(x: Tensor) -> Tensor:
    """float64 stays; anything else as float32."""
    return x if x.dtype == torch.float64 else x.float()
