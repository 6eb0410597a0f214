"""A layer's weight as integers per output channel: derived whenever the weight changes, or packed, integers for good.

Packed are two 4-bit codes in a byte or one 8-bit code, and a float32 scale per channel. For anchors a layer may keep
8-bit codes of what rounding took from its weight, W - W_q, as well.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any, Never

import torch
from torch import Tensor, nn

from modiff.config import WeightConfig
from modiff.core.affine import QParams, dequantize, qrange, quantize_tensor
from modiff.core.hadamard import RotatedRun, rotate
from modiff.core.observers import MinMaxObserver, MSEObserver
from modiff.errors import ConfigError, StateError
from modiff.kernels.layout import weight_codes
from modiff.kernels.native import Fingerprint, fingerprint

WeightCodes = tuple[Tensor, QParams]
"""int8 codes of some columns of a weight, and their scale per output channel."""

SCALE, ERROR, ERROR_SCALE = "weight_scale", "weight_error", "weight_error_scale"
"""Names of the buffers of a packed layer: scales of `weight`; codes of its rounding error and their scales."""
PACKED = ("weight", SCALE, ERROR, ERROR_SCALE)
"""Names of all tensors that stand for a packed weight."""
_HALF_BYTE = 4
# relative rounding error of bfloat16, the coarsest dtype that a weight may pass through after its codes were fixed, and
# absolute error of float16 below its smallest normal number, with room for one more
_HALF, _TINY = 2.0**-8, 2.0**-24


class QuantizedWeight:
    """w ~ scale_o * code_o: symmetric, one scale per output channel and range of columns.

    columns: how many input channels each range has (a split shortcut has two). rotation: blocks of the input rotation
    folded into the weight. transposed: groups of a layer whose parameter is (I, O / groups, ...), else 0. smoothing,
    order: factors of the input channels, (I, 1, ...) or (I,), and their order, folded in too.
    With bits None floats are kept, rotated ones if `rotation` is set.

    The codes follow the parameter. Writes through `.data` (a fused LoRA) leave no trace on a tensor: after `forget`,
    which every trajectory calls, a fingerprint of the bytes tells whether the codes must be made again.
    Learned codes (`fix`) are kept, and checked against the parameter whenever others would be made again.
    """

    def __init__(
        self, config: WeightConfig, columns: tuple[int, ...], rotation: tuple[RotatedRun, ...] | None,
        name: str = "weight", transposed: int = 0, smoothing: Tensor | None = None, order: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.config, self.columns, self.rotation, self.name = config, columns, rotation, name
        self.transposed, self.smoothing, self.order = transposed, smoothing, order
        self.fixed = False
        self.edition = 0
        self._key: tuple[object, ...] | None = None
        self._bytes: Fingerprint | None = None
        self._rotated: Tensor | None = None
        self._codes: tuple[WeightCodes, ...] = ()

    def forget(self) -> None:
        """Derive the codes again at the next use if the weight changed; fixed ones are checked again then."""
        self._key = None

    @property
    def known(self) -> bool:
        """Whether the weight was compared since `forget`."""
        return self._key is not None

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
        """The values before rounding, as the layer's input is prepared, (O, I / groups, ...); float32 at least."""
        values = turned(at_least_float32(weight.detach()), self.transposed)
        values = values if self.smoothing is None else values * self.smoothing.to(values.device)
        values = values if self.order is None else values.index_select(1, self.order.to(values.device))
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
            return self.edition
        digest, before = fingerprint(weight), self._codes
        if digest is None or digest != self._bytes:
            written = self._key is not None and self._key[0] == key[0] and self._key[1] != version
            self._bytes = None
            self._derive(weight)
            # where bytes cannot be compared, an offloaded weight that came back is known by its codes
            pair = [codes[0][0] for codes in (before, self._codes) if codes]
            changed = len(pair) == 2 and not (pair[0].device == pair[1].device and torch.equal(*pair))
            self.edition += written or digest is not None or changed
        self._key, self._bytes = key, digest
        return self.edition

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


def _half_error(values: Tensor, rotation: tuple[RotatedRun, ...] | None) -> Tensor:
    bounds = []
    runs = rotation or (RotatedRun(values.shape[1], 1),)
    for columns, run in zip(values.split([r.channels for r in runs], 1), runs, strict=True):
        blocks = columns.unflatten(1, (-1, run.block))
        norm = blocks.square().sum(2, keepdim=True).sqrt() + _TINY / _HALF * run.block**0.5
        bounds.append((_HALF * norm).expand_as(blocks).flatten(1, 2))
    return torch.cat(bounds, 1)


# -------------------------------------------------------------------------------------------------- integers for good


def packed_storage(
    bits: int, shape: tuple[int, ...], ranges: int, *, error: bool
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each tensor of a packed weight with `ranges` scales a row; `error`: those of anchor codes too.

    >>> packed_storage(4, (320, 320, 3, 3), 1, error=False)["weight"]
    (torch.uint8, (320, 1440))
    """
    halves = torch.uint8, (shape[0], -(-math.prod(shape[1:]) // 2))
    scales = torch.float32, (shape[0], ranges)
    stored = {"weight": halves if bits <= _HALF_BYTE else (torch.int8, shape), SCALE: scales}
    return stored | {ERROR: (torch.int8, shape), ERROR_SCALE: scales} if error else stored


def pack_nibbles(codes: Tensor) -> Tensor:
    """int8 codes in -8..7, (O, ...) -> uint8 (O, ceil(n / 2)) for rows of n codes: the first in the low half of a byte.

    >>> pack_nibbles(torch.tensor([[1, -1, 7]], dtype=torch.int8))
    tensor([[241,   7]], dtype=torch.uint8)
    """
    rows = codes.flatten(1)
    if rows.shape[1] % 2:
        rows = torch.nn.functional.pad(rows, (0, 1))
    return ((rows[:, ::2] & 15) | (rows[:, 1::2] << 4)).view(torch.uint8)


class PackedWeight(QuantizedWeight):
    """w ~ scale_o * code_o where only the codes are kept, and unpacked at each use, whatever weight is given.

    shape: (O, I / groups, ...). dtype: that the weight had, and has for those who read it. tensors: the dictionaries of
    the layer's parameters and buffers, which hold codes and scales.
    """

    def __init__(self, was: QuantizedWeight, shape: tuple[int, ...], dtype: torch.dtype, *tensors: Any) -> None:
        super().__init__(was.config, was.columns, was.rotation, was.name, was.transposed, was.smoothing, was.order)
        self.shape, self.dtype, (self._parameters, self._buffers) = shape, dtype, tensors
        self._version = -1  # of the codes when they were compared
        self.fixed = True  # the codes are the weight, and never rounded again
        self._parameters["weight"].new_empty = self.floats  # what torch's spectral_norm asks for first

    def refresh(self, weight: Tensor) -> int:
        """A number that is another one after each write to the codes, or through `.data` as `forget` has it."""
        if (key := (weight.data_ptr(), version_of(weight))) == self._key:
            return self.edition
        codes, scales = self.stored()
        digest, before = (fingerprint(codes), fingerprint(scales)), self._bytes
        written = self._key is not None and self._key[0] == key[0]
        if before is not None and (digest != before if digest[0] and before[0] else written):
            self.edition += 1
            if not codes.is_inference() and self._version == key[1]:
                codes.add_(0)  # through `.data`: what backends made of them is known by the version
                key = key[0], version_of(weight)
        self._key, self._bytes, self._version = key, digest, key[1]
        return self.edition

    def codes(self, weight: Tensor | None = None) -> tuple[WeightCodes, ...]:
        """(int8 codes, scales) for each range of columns."""
        return self._split(weight_codes(self.stored()[0], self.shape), SCALE)

    def stored(self) -> tuple[Tensor, Tensor]:
        """The codes as they are kept, and their scales."""
        return self._parameters["weight"].detach(), self.buffer(SCALE)

    def buffer(self, name: str) -> Tensor:
        """A tensor of the weight other than its codes. Raises: StateError without it."""
        if (value := self._buffers.get(name)) is None:
            raise StateError(f"{self.name}: expected the buffer {name}, got none. Codes mean nothing without their "
                             "scales. Load the model again.")  # fmt: skip
        return value

    def dense(self, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The weight that the layer computes with, in `dtype`. Cost: one pass over the codes, two at 4 bits."""
        return dense(self.codes(), dtype)

    def exact(self, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The weight before rounding as far as it was kept: `dense`, and what the codes of its rounding error say."""
        codes, rounded = self._buffers.get(ERROR), self.dense(weight, dtype)
        return rounded if codes is None else rounded + dense(self._split(codes, ERROR_SCALE), dtype)

    def readable(self) -> Tensor:
        """What the layer's codes stand for, as a float weight that cannot be written."""
        with torch.inference_mode(False), torch.no_grad():  # its version tells who writes
            values = self.dense(None, torch.float32)
            values = values if self.rotation is None else rotate(values, self.rotation, 1)
            values = values if self.order is None else values.index_select(1, self.order.argsort().to(values.device))
            values = values if self.smoothing is None else values / self.smoothing.to(values.device)
            values = turned(values, self.transposed).to(self.dtype).as_subclass(_ReadOnly)
        values.refuse, values._is_param = self.floats, True  # torch's sign that a tensor is an nn.Parameter
        return values

    def keep(self, value: Tensor | None) -> None:
        """Nothing where what `readable` returned is put back. Raises: StateError for anything else."""
        own = isinstance(value, _ReadOnly) and value.refuse == self.floats
        if not own or not torch.equal(self.readable().to(value), value):
            self.floats(value)

    def floats(self, *_: object) -> Never:
        """Raises: StateError; the floats are gone."""
        raise StateError(
            f"{self.name}: expected a float weight, got a packed one. Packing keeps the integers alone, and rounding "
            "starts from floats. Do this before modiff.pack, on the full-precision model."
        )

    fix = unfix = floats

    def _split(self, codes: Tensor, scale: str) -> tuple[WeightCodes, ...]:
        scales = self.buffer(scale).reshape(len(codes), -1, *[1] * (codes.dim() - 2)).split(1, 1)
        return tuple((c, QParams(s, None)) for c, s in zip(codes.split(self.columns, 1), scales, strict=True))


def _writes(name: str) -> bool:
    return name.endswith("_") and name[-2:] != "__" and name not in ("requires_grad_", "share_memory_", "detach_")


class _ReadOnly(Tensor):
    """Floats that codes stand for, and views of them: read as any tensor, refused where they are written.

    Raw memory cannot tell: NumPy's arrays of it are read-only, DLPack is refused, a storage or an address is not.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        values = () if torch.compiler.is_compiling() else _flat((*args, *(kwargs or {}).values()))
        read = [each for each in values if isinstance(each, _ReadOnly)]
        if read and args and isinstance(args[0], _ReadOnly) and _writes(getattr(func, "__name__", "")):
            args[0].refuse()  # also what leaves no trace, as `apply_`
        with torch._C.DisableTorchFunctionSubclass():
            versions = [version_of(each) for each in read]
            result = func(*args, **kwargs or {})
            if func == Tensor.data.__set__ and isinstance(args[0], _ReadOnly):
                args[0].refuse.__self__.keep(args[0])
            if versions != [version_of(each) for each in read]:  # what was written is nobody's any more
                read[0].refuse()
            if read and hasattr(result, "setflags"):
                result.setflags(write=False)
            views = [cls._view(each, read[0]) for each in _flat((result,))] if read else [result]
            return type(result)(views) if isinstance(result, tuple | list) and read else views[0]

    @classmethod
    def _view(cls, value: Any, source: "_ReadOnly") -> Any:
        if not isinstance(value, Tensor) or isinstance(value, cls):
            return value
        if value.untyped_storage().data_ptr() != source.untyped_storage().data_ptr():
            return value
        view = value.as_subclass(cls)
        view.refuse = source.refuse
        return view

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.unbind(0))

    def __dlpack__(self, *_: object, **__: object) -> Never:
        self.refuse()

    set_ = _use_count = __dlpack__  # torch.utils.swap_tensors asks for the latter before it changes anything

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Floats of whoever copies them."""
        return nn.Parameter(self.clone(), requires_grad=False) if isinstance(self, nn.Parameter) else self.clone()


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        yield from value if isinstance(value, tuple | list) else (value,)


def pack_codes(codes: tuple[WeightCodes, ...], bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scales as they are kept: one tensor of codes, float32 scales (O, ranges of columns)."""
    joined = torch.cat([each for each, _ in codes], 1)
    scale = torch.stack([q.scale.flatten().float() for _, q in codes], 1)
    return pack_nibbles(joined) if bits <= _HALF_BYTE else joined.contiguous(), scale
