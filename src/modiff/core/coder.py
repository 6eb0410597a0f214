"""Turns a residual into integer codes: a quantizer config, resolved for one layer, with its measured scales."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from modiff.config import Granularity, QuantizerConfig
from modiff.core.affine import QParams, choose_qparams, dequantize, quantize
from modiff.core.observers import Observer
from modiff.errors import CalibrationError, ConfigError


class Code(NamedTuple):
    """The integers that one step sends for one tensor, one part for each segment of its channels.

    parts: (int8 codes, their scale and zero point); the parts lie side by side along `channel_dim`.
    """

    parts: tuple[tuple[Tensor, QParams], ...]
    channel_dim: int

    def value(self) -> Tensor:
        """What the codes stand for, in the dtype of the scales; the shape of the residual."""
        values = [dequantize(codes, qparams) for codes, qparams in self.parts]
        return values[0] if len(values) == 1 else torch.cat(values, self.channel_dim)


class Coder:
    """code(r) = clamp(round(r / s), qmin, qmax) with s = clip * max|r| / qmax, for each segment of the channels.

    Args:
        config: bits, clip ratio, dynamic or static scales. bits None is not for a coder: there is nothing to code.
        granularity: resolved, not "auto".
        channel_dim: -1 for linear layers, 1 for convolutions.
        segments: channel counts that get a quantizer each; one segment is the usual case, two a split shortcut.
    """

    def __init__(
        self, config: QuantizerConfig, granularity: Granularity, channel_dim: int, segments: tuple[int, ...]
    ) -> None:
        if config.bits is None:
            raise ConfigError(
                "Coder.bits: expected 0 or 2 to 8, got None. Full precision has no codes. Skip the coder."
            )
        if not config.dynamic and granularity in ("sample", "token"):
            granularity = "tensor"  # "auto" of a static quantizer: one scale that was measured before
        self.config = config
        self.bits = config.bits
        self.granularity: Granularity = granularity
        self.channel_dim = channel_dim
        self.segments = segments
        self.static: tuple[QParams, ...] | None = None
        self.observers: tuple[Observer, ...] | None = None

    def __call__(self, residual: Tensor) -> Code | None:
        """Codes of a residual, with the static scales if the config asks for them; None at 0 bits.

        Raises: CalibrationError if static scales were never measured.
        """
        if self.bits == 0:
            return None
        if self.observers is not None:
            for observer, part in zip(self.observers, self._split(residual), strict=True):
                observer.observe(part)
        if self.config.dynamic or self.observers is not None:
            return self.fresh(residual)
        if self.static is None:
            raise CalibrationError(
                "Coder: expected measured scales, got none. The config says dynamic=False. "
                "Call modiff.calibrate(model, lambda: pipe(...)) first."
            )
        return self._code(residual, [_to(q, residual) for q in self.static])

    def fresh(self, residual: Tensor) -> Code | None:
        """Codes with scales measured on this very tensor, also for static configs (first-step rounds need them)."""
        if self.bits == 0:
            return None
        qparams = [
            choose_qparams(
                part,
                self.bits,
                self.granularity,
                symmetric=self.config.symmetric,
                clip=self.config.clip,
                channel_dim=self.channel_dim,
            )
            for part in self._split(residual)
        ]
        return self._code(residual, qparams)

    def freeze(self) -> None:
        """Turn what the observers saw into static scales. Raises: CalibrationError if they saw nothing."""
        observers, self.observers = self.observers or (), None
        self.static = tuple(
            o.qparams(self.bits, symmetric=self.config.symmetric, clip=self.config.clip) for o in observers
        )

    def _code(self, residual: Tensor, qparams: list[QParams]) -> Code:
        parts = zip(self._split(residual), qparams, strict=True)
        return Code(tuple((quantize(part, q, self.bits), q) for part, q in parts), self.channel_dim)

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x,) if len(self.segments) == 1 else x.split(list(self.segments), self.channel_dim)


def _to(qparams: QParams, like: Tensor) -> QParams:
    zero_point = None if qparams.zero_point is None else qparams.zero_point.to(like.device)
    return QParams(qparams.scale.to(like.device, like.dtype), zero_point)
