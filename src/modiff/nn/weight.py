"""A layer's weight as integers per output channel, derived when needed and again whenever the weight changes."""

from __future__ import annotations

import torch
from torch import Tensor

from modiff.config import WeightConfig
from modiff.core.affine import QParams, dequantize, qrange, quantize_tensor
from modiff.core.hadamard import Segment, rotate
from modiff.core.observers import MinMaxObserver, MSEObserver
from modiff.errors import ConfigError, StateError
from modiff.kernels.native import Fingerprint, fingerprint

Part = tuple[Tensor, QParams]
"""int8 codes of one segment of the input channels, and their scale per output channel."""

_HALF = 2.0**-8
"""Relative rounding error of bfloat16, the coarsest dtype that a weight may pass through after its codes were fixed."""
_TINY = 2.0**-24
"""Absolute rounding error of float16 below its smallest normal number, with room for one more."""


class QuantizedWeight:
    """w ~ scale_o * code_o: symmetric, one scale per output channel and per segment of the input channels.

    Args:
        config: bits and range search; bits None keeps floats (rotated ones if `rotation` is set).
        segments: input channels that get scales of their own (a split shortcut has two).
        rotation: blocks of the input rotation folded into the weight, or None.
        name: for messages.

    The codes follow the parameter. Writes through `.data` (a fused LoRA) leave no trace on a tensor: after `forget`,
    which every trajectory calls, a fingerprint of the bytes tells whether the codes must be made again.
    Learned codes (`fix`) are kept, and checked against the parameter whenever others would be made again.
    """

    def __init__(
        self,
        config: WeightConfig,
        segments: tuple[int, ...],
        rotation: tuple[Segment, ...] | None,
        name: str = "weight",
    ) -> None:
        self.config, self.segments, self.rotation, self.name = config, segments, rotation, name
        self._key: tuple[object, ...] | None = None
        self._bytes: Fingerprint | None = None
        self._floats: Tensor | None = None
        self._parts: tuple[Part, ...] = ()
        self._fixed: tuple[Part, ...] | None = None
        self._searched: dict[int, tuple[Tensor, QParams]] = {}

    def forget(self) -> None:
        """Derive the codes again at the next use if the weight changed; fixed ones are checked again then."""
        self._key = None

    @property
    def fixed(self) -> bool:
        """Whether the codes were given by `fix`."""
        return self._fixed is not None

    def fix(self, parts: tuple[Part, ...]) -> None:
        """Let these codes be the weight from now on, for example after AdaRound.

        Args:
            parts: for each segment along axis 1, int8 codes (O, segment, ...) of the rotated weight if the layer
                rotates, and symmetric scales (O, 1, ...). They survive `.to()`, `.half()` and `forget`.
        Raises: ConfigError if they are no codes for this layer.
        """
        if problem := self._problem(parts):
            raise ConfigError(
                f"{self.name}: expected codes for {len(self.segments)} segments at {self.config.bits} bits, got "
                f"{problem}. Fixed codes take the place of rounding. Give what `codes` returns, rounded otherwise."
            )
        self._fixed = tuple((c.detach(), QParams(q.scale.detach(), None)) for c, q in parts)
        self._key = self._bytes = None

    def unfix(self) -> None:
        """Round to nearest again; nothing happens where `fix` was not called."""
        self._fixed = self._key = self._bytes = None

    def codes(self, weight: Tensor) -> tuple[Part, ...]:
        """(int8 codes, scales) for each segment along axis 1; empty when bits is None.

        Raises: ConfigError for a weight with NaN; StateError if the weight no longer belongs to its fixed codes.
        """
        self._refresh(weight)
        return self._parts

    def bytes_kept(self) -> tuple[int, int]:
        """Of what is kept besides the weight itself: a rotated copy in floats, codes and their scales."""
        codes = sum(codes.nbytes + qparams.scale.nbytes for codes, qparams in self._parts)
        return 0 if self._floats is None else self._floats.nbytes, codes

    def floats(self, weight: Tensor) -> Tensor:
        """The values before rounding, rotated if the layer rotates; float32, or float64 for a float64 weight."""
        values = weight.detach()
        values = values if values.dtype == torch.float64 else values.float()
        return values if self.rotation is None else rotate(values, self.rotation, 1)

    def exact(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight before rounding, rotated if the layer rotates, in `dtype`. Raises: as `codes`."""
        self._refresh(weight)
        return self.floats(weight).to(dtype)

    def error(self, weight: Tensor) -> tuple[Part, ...]:
        """W - W_q in 8-bit codes for each segment, to half a scale; for weights with bits. Raises: as `codes`."""
        self._refresh(weight)
        values = self.floats(weight)
        return tuple(_nearest(part, 8) for part in (values - dense(self._parts, values.dtype)).split(self.segments, 1))

    def dense(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight that the layer computes with, in `dtype`. Cost: one pass over the weight when quantized."""
        self._refresh(weight)
        if self._parts:
            return dense(self._parts, dtype)
        return (weight if self._floats is None else self._floats).detach().to(dtype)

    def _refresh(self, weight: Tensor) -> None:
        version = 0 if weight.is_inference() else weight._version
        key = (weight.data_ptr(), version, weight.dtype, weight.device, weight.shape)
        if key == self._key:
            return
        digest = fingerprint(weight)
        if digest is not None and digest == self._bytes:
            self._key = key
            return
        self._bytes = None
        values = weight.detach()  # torch has no isfinite of float8, which layerwise casting may leave here
        if not torch.isfinite(values if values.dtype.itemsize > 1 else values.float()).all():
            raise ConfigError(
                f"{self.name}: expected finite numbers, got NaN or infinity. The checkpoint is damaged, or float16 "
                "overflowed. Load it in float32, or exclude the layer."
            )
        self._floats, self._parts = None, ()
        if self._fixed is not None:
            self._fixed = self._parts = tuple(
                (c.to(weight.device), QParams(q.scale.to(weight.device), None)) for c, q in self._fixed
            )
            self._check_fixed(self.floats(weight))
        elif self.config.bits is not None:
            self._parts = self._quantize(self.floats(weight), self.config.bits)
        elif self.rotation is not None:
            values = self.floats(weight)  # blocks of one channel turn nothing, and give the weight itself
            self._floats = None if values.data_ptr() == weight.data_ptr() else values
        self._key, self._bytes = key, digest

    def _quantize(self, values: Tensor, bits: int) -> tuple[Part, ...]:
        split = values.split(self.segments, 1)
        if self.config.search != "mse":
            return tuple(_nearest(part, bits) for part in split)
        scales = [self._search(index, part, bits) for index, part in enumerate(split)]
        return tuple(
            (quantize_tensor(part, qparams, bits), qparams) for part, qparams in zip(split, scales, strict=True)
        )

    def _search(self, index: int, part: Tensor, bits: int) -> QParams:
        """The scales of least error: 80 passes, and one while the sums of the rows' bit patterns stay."""
        patterns = part.view(torch.int64 if part.dtype == torch.float64 else torch.int32)
        sums = patterns.flatten(1).sum(1)
        known = self._searched.get(index)
        if known is None or known[0].device != sums.device or not torch.equal(known[0], sums):
            observer = MSEObserver(0, keep=None)
            observer.observe(part)
            known = self._searched[index] = (sums, observer.qparams(bits))
        return known[1]

    def _problem(self, parts: tuple[Part, ...]) -> str:
        """What is wrong with codes that are to be fixed; empty if nothing is."""
        if self.config.bits is None:
            return "codes for a layer whose weight keeps its floats"
        if tuple(c.shape[1] if c.dim() > 1 else 0 for c, _ in parts) != self.segments:
            return f"shapes {[tuple(c.shape) for c, _ in parts]}"
        qmin, qmax = qrange(self.config.bits)
        for codes, (scale, zero_point) in parts:
            if codes.dtype != torch.int8 or (codes.numel() and (codes.min() < qmin or codes.max() > qmax)):
                return f"{codes.dtype} outside {qmin}..{qmax}"
            if zero_point is not None or scale.shape != (codes.shape[0], *[1] * (codes.dim() - 1)):
                return f"scales of shape {tuple(scale.shape)}{' with zero points' if zero_point is not None else ''}"
            if not scale.is_floating_point() or not (torch.isfinite(scale).all() and (scale > 0).all()):
                return "scales that are not positive numbers"
        return ""

    def _check_fixed(self, values: Tensor) -> None:
        codes, qmax = torch.cat([c for c, _ in self._parts], 1), qrange(self.config.bits or 8)[1]
        fits = codes.shape == values.shape
        if fits:
            scale = torch.cat([q.scale.expand_as(c) for c, q in self._parts], 1)
            # a learned code is floor(w / s) or one more: within a step of w / s, or short of it where it saturates
            off, slack = values / scale - codes, 1 + _half_error(values, self.rotation) / scale
            fits = bool((((off <= slack) | (codes >= qmax)) & ((off >= -slack) | (codes <= -qmax))).all())
        if not fits:
            raise StateError(
                f"{self.name}: expected the weight whose codes were fixed, got another one: the weight changed after "
                "its rounding was learned. The codes mean nothing for it. Undo the change, or call modiff.reconstruct "
                "again."
            )


def dense(parts: tuple[Part, ...], dtype: torch.dtype) -> Tensor:
    """What the codes of all segments stand for, in `dtype`."""
    values = [dequantize(codes, QParams(q.scale.to(dtype), None)) for codes, q in parts]
    return values[0] if len(values) == 1 else torch.cat(values, 1)


def _nearest(values: Tensor, bits: int) -> Part:
    observer = MinMaxObserver(0)
    observer.observe(values)
    qparams = observer.qparams(bits)
    return quantize_tensor(values, qparams, bits), qparams


def _half_error(values: Tensor, rotation: tuple[Segment, ...] | None) -> Tensor:
    """Bound of |R e| after a pass through half precision, |e| <= eps |w|: eps times the norm of the block."""
    bounds = []
    segments = rotation or (Segment(values.shape[1], 1),)
    for part, segment in zip(values.split([s.channels for s in segments], 1), segments, strict=True):
        blocks = part.unflatten(1, (-1, segment.block))
        norm = blocks.square().sum(2, keepdim=True).sqrt() + _TINY / _HALF * segment.block**0.5
        bounds.append((_HALF * norm).expand_as(blocks).flatten(1, 2))
    return torch.cat(bounds, 1)
