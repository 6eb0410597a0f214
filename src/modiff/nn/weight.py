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

WeightCodes = tuple[Tensor, QParams]
"""int8 codes of some columns of a weight, and their scale per output channel."""

# relative rounding error of bfloat16, the coarsest dtype that a weight may pass through after its codes were fixed, and
# absolute error of float16 below its smallest normal number, with room for one more
_HALF, _TINY = 2.0**-8, 2.0**-24


class QuantizedWeight:
    """w ~ scale_o * code_o: symmetric, one scale per output channel and range of columns.

    Args:
        config: bits and range search; bits None keeps floats (rotated ones if `rotation` is set).
        columns: how many input channels each range has (a split shortcut has two).
        rotation: blocks of the input rotation folded into the weight, or None.
        name: for messages.
        transposed: groups of a transposed convolution, whose parameter is (I, O / groups, ...); 0 of other layers.

    The codes follow the parameter. Writes through `.data` (a fused LoRA) leave no trace on a tensor: after `forget`,
    which every trajectory calls, a fingerprint of the bytes tells whether the codes must be made again.
    Learned codes (`fix`) are kept, and checked against the parameter whenever others would be made again.
    """

    def __init__(
        self, config: WeightConfig, columns: tuple[int, ...], rotation: tuple[Segment, ...] | None,
        name: str = "weight", transposed: int = 0,
    ) -> None:  # fmt: skip
        self.config, self.columns, self.rotation, self.name = config, columns, rotation, name
        self.transposed = transposed
        self.fixed = False
        self._edition = 0
        self._key: tuple[object, ...] | None = None
        self._bytes: Fingerprint | None = None
        self._rotated: Tensor | None = None
        self._codes: tuple[WeightCodes, ...] = ()

    def forget(self) -> None:
        """Derive the codes again at the next use if the weight changed; fixed ones are checked again then."""
        self._key = None

    def fix(self, codes: tuple[WeightCodes, ...]) -> None:
        """Let these codes, as `codes` has them, be the weight from now on; they survive `.to()` and `forget`.

        Raises: ConfigError if they are no codes for this layer.
        """
        bits, form = self.config.bits, [(each.dtype, each.shape[1]) for each, _ in codes]
        fits = bits is not None and form == [(torch.int8, columns) for columns in self.columns]
        for each, (scale, zero_point) in codes if fits else ():
            qmin, qmax = qrange(bits)
            fits &= zero_point is None and bool(((scale > 0) & scale.isfinite()).all())
            fits &= len(scale) == len(each) and bool(((each >= qmin) & (each <= qmax)).all())
        if not fits:
            raise ConfigError(
                f"{self.name}: expected {bits}-bit codes for {self.columns} columns and positive scales, got {form}. "
                "Fixed codes take the place of rounding. Give what `codes` returns, rounded otherwise."
            )
        self.fixed, self._codes = True, tuple((c.detach(), QParams(q.scale.detach(), None)) for c, q in codes)
        self._key = self._bytes = None

    def unfix(self) -> None:
        """Round to nearest again; nothing happens where `fix` was not called."""
        self.fixed, self._key, self._bytes = False, None, None

    def codes(self, weight: Tensor) -> tuple[WeightCodes, ...]:
        """(int8 codes, scales) for each range of columns; empty when bits is None.

        Raises: ConfigError for a weight with NaN; StateError if the weight no longer belongs to its fixed codes.
        """
        self.refresh(weight)
        return self._codes

    def bytes_kept(self) -> tuple[int, int]:
        """Of what is kept besides the weight itself: a rotated copy in floats, codes and their scales."""
        codes = sum(codes.nbytes + qparams.scale.nbytes for codes, qparams in self._codes)
        return 0 if self._rotated is None else self._rotated.nbytes, codes

    def floats(self, weight: Tensor) -> Tensor:
        """The values before rounding, rotated if the layer rotates, (O, I / groups, ...); float32 at least."""
        values = turned(at_least_float32(weight.detach()), self.transposed)
        return values if self.rotation is None else rotate(values, self.rotation, 1)

    def exact(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight before rounding, rotated if the layer rotates, in `dtype`. Raises: as `codes`."""
        self.refresh(weight)
        return self.floats(weight).to(dtype)

    def error(self, weight: Tensor) -> tuple[WeightCodes, ...]:
        """W - W_q in 8-bit codes, to half a scale; for weights with bits. Raises: as `codes`."""
        values = self.floats(weight)
        lost = values - dense(self.codes(weight), values.dtype)
        return tuple(_rounded(each, 8) for each in lost.split(self.columns, 1))

    def dense(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight that the layer computes with, in `dtype`. Cost: one pass over the weight when quantized."""
        self.refresh(weight)
        if self._codes:
            return dense(self._codes, dtype)
        return (self.floats(weight) if self._rotated is None else self._rotated).to(dtype)

    def refresh(self, weight: Tensor) -> int:
        """Derive the codes again if the weight changed. Returns: a number that is another one after each change."""
        version = 0 if weight.is_inference() else weight._version
        key = (weight.data_ptr(), version, weight.dtype, weight.device, weight.shape)
        if key == self._key:
            return self._edition
        digest, before = fingerprint(weight), self._codes
        if digest is None or digest != self._bytes:
            written = self._key is not None and self._key[0] == key[0] and self._key[1] != version
            self._bytes = None
            self._derive(weight)
            # where bytes cannot be compared, an offloaded weight that came back is known by its codes
            pair = [codes[0][0] for codes in (before, self._codes) if codes]
            changed = len(pair) == 2 and not (pair[0].device == pair[1].device and torch.equal(*pair))
            self._edition += written or digest is not None or changed
        self._key, self._bytes = key, digest
        return self._edition

    def _derive(self, weight: Tensor) -> None:
        values = self.floats(weight)
        if not torch.isfinite(values).all():
            raise ConfigError(
                f"{self.name}: expected finite numbers, got NaN or infinity. The checkpoint is damaged, or float16 "
                "overflowed. Load it in float32, or exclude the layer."
            )
        if self.fixed:
            self._codes = tuple((c.to(weight.device), QParams(q.scale.to(weight.device), None)) for c, q in self._codes)
            self._check_fixed(values)
            return
        self._rotated, self._codes = None, ()
        if self.config.bits is not None:
            columns, search = values.split(self.columns, 1), self.config.search
            self._codes = tuple(_rounded(each, self.config.bits, search) for each in columns)
        elif self.rotation is not None and values.data_ptr() != weight.data_ptr():
            self._rotated = values  # blocks of one channel turn nothing, and give the weight itself

    def _check_fixed(self, values: Tensor) -> None:
        codes, qmax = torch.cat([c for c, _ in self._codes], 1), qrange(self.config.bits or 8)[1]
        fits = codes.shape == values.shape
        if fits:
            scale = torch.cat([q.scale.expand_as(c) for c, q in self._codes], 1)
            # a learned code is floor(w / s) or one more: within a step of w / s, or short of it where it saturates
            off, slack = values / scale - codes, 1 + _half_error(values, self.rotation) / scale
            fits = bool((((off <= slack) | (codes >= qmax)) & ((off >= -slack) | (codes <= -qmax))).all())
        if not fits:
            raise StateError(
                f"{self.name}: expected the weight whose codes were fixed, got another one: the weight changed after "
                "its rounding was learned, so they mean nothing. Undo the change, or call modiff.reconstruct again."
            )


def at_least_float32(x: Tensor) -> Tensor:
    """float64 stays; anything else as float32."""
    return x if x.dtype == torch.float64 else x.float()


def turned(weight: Tensor, groups: int) -> Tensor:
    """(I, O / groups, ...) from (O, I / groups, ...), and back; the weight itself for 0 groups."""
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1) if groups else weight


def version_of(x: Tensor) -> int:
    """How often a tensor was written in place; inference tensors do not count, and read 0."""
    return 0 if x.is_inference() else x._version


def dense(codes: tuple[WeightCodes, ...], dtype: torch.dtype) -> Tensor:
    """What the codes of all columns stand for, in `dtype`."""
    values = [dequantize(each, QParams(q.scale.to(dtype), None)) for each, q in codes]
    return values[0] if len(values) == 1 else torch.cat(values, 1)


def _rounded(values: Tensor, bits: int, search: str = "minmax") -> WeightCodes:
    observer = MSEObserver(0, keep=None) if search == "mse" else MinMaxObserver(0)
    observer.observe(values)
    qparams = observer.qparams(bits)
    return quantize_tensor(values, qparams, bits), qparams


def _half_error(values: Tensor, rotation: tuple[Segment, ...] | None) -> Tensor:
    """Bound of |R e| after a pass through half precision, |e| <= eps |w|: eps times the norm of the block."""
    bounds = []
    segments = rotation or (Segment(values.shape[1], 1),)
    for columns, segment in zip(values.split([s.channels for s in segments], 1), segments, strict=True):
        blocks = columns.unflatten(1, (-1, segment.block))
        norm = blocks.square().sum(2, keepdim=True).sqrt() + _TINY / _HALF * segment.block**0.5
        bounds.append((_HALF * norm).expand_as(blocks).flatten(1, 2))
    return torch.cat(bounds, 1)
