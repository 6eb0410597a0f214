"""A layer's weight as integers per output channel, derived when needed and again whenever the weight changes."""

from __future__ import annotations

import torch
from torch import Tensor

from modiff.config import WeightConfig
from modiff.core.affine import QParams, dequantize, quantize
from modiff.core.observers import MinMaxObserver, MSEObserver
from modiff.core.transforms import Segment, rotate
from modiff.errors import ConfigError


class QuantizedWeight:
    """w ~ scale_o * code_o: symmetric, one scale per output channel and per segment of the input channels.

    Args:
        config: bits and range search; bits None keeps floats (rotated ones if `rotation` is set).
        segments: input channels that get scales of their own (a split shortcut has two).
        rotation: blocks of the input rotation folded into the weight, or None.

    The codes follow the parameter: after `.to()`, `.half()` or a loaded state dict they are made again. Writes through
    `.data` (a fused LoRA) leave no trace on a tensor: `forget` makes the codes again, and every trajectory calls it.
    """

    def __init__(self, config: WeightConfig, segments: tuple[int, ...], rotation: tuple[Segment, ...] | None) -> None:
        self.config, self.segments, self.rotation = config, segments, rotation
        self._key: tuple[object, ...] | None = None
        self._floats: Tensor | None = None
        self._parts: tuple[tuple[Tensor, QParams], ...] = ()

    def forget(self) -> None:
        """Derive the codes again at the next use."""
        self._key = None

    def codes(self, weight: Tensor) -> tuple[tuple[Tensor, QParams], ...]:
        """(int8 codes, scales) for each segment along axis 1; empty when bits is None."""
        self._refresh(weight)
        return self._parts

    def dense(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight that the layer computes with, in `dtype`. Cost: one pass over the weight when quantized."""
        self._refresh(weight)
        if self._parts:
            parts = [dequantize(c, QParams(q.scale.to(dtype), None)) for c, q in self._parts]
            return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return (weight if self._floats is None else self._floats).detach().to(dtype)

    def _refresh(self, weight: Tensor) -> None:
        version = 0 if weight.is_inference() else weight._version
        key = (weight.data_ptr(), version, weight.dtype, weight.device, weight.shape)
        if key == self._key:
            return
        values = weight.detach()
        if not torch.isfinite(values).all():
            raise ConfigError(
                "weight: expected finite numbers, got NaN or infinity. The checkpoint is damaged, or float16 "
                "overflowed. Load it in float32, or exclude the layer."
            )
        if self.rotation is not None:
            values = rotate(values.float() if values.dtype != torch.float64 else values, self.rotation, 1)
            self._floats = values
        if self.config.bits is not None:
            self._parts, self._floats = self._quantize(values, self.config.bits), None
        self._key = key

    def _quantize(self, values: Tensor, bits: int) -> tuple[tuple[Tensor, QParams], ...]:
        values = values if values.dtype == torch.float64 else values.float()
        parts: list[tuple[Tensor, QParams]] = []
        for part in values.split(list(self.segments), 1):
            observer = MSEObserver(0) if self.config.search == "mse" else MinMaxObserver(0)
            observer.observe(part)
            qparams = observer.qparams(bits)
            parts.append((quantize(part, qparams, bits), qparams))
        return tuple(parts)
