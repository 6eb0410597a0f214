"""The uniform affine quantizer: ranges to scales, floats to integer codes and back.

One convention everywhere: code = clamp(round(x / scale) + zero_point, qmin, qmax), signed, stored as int8.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from modiff.core.granularity import BY_NAME, extremes
from modiff.errors import ConfigError

SMALLEST_SCALE = 1e-12
"""Floor of every scale: an all-zero residual codes to zeros instead of dividing by zero."""


class QParams(NamedTuple):
    """Scale (float, > 0) and zero point (int32, inside [qmin, qmax]; None: symmetric), broadcastable to the tensor."""

    scale: Tensor
    zero_point: Tensor | None


class _Ranges(dict[int, tuple[int, int]]):
    """By bits. Looked up at every step: by subscription, as torch.compile warns of a cached function."""

    def __missing__(self, bits: int) -> tuple[int, int]:
        raise ConfigError(f"bits: expected 2 to 8, got {bits}. Codes are stored as int8. Use None for full precision.")


_RANGES = _Ranges({bits: (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in (*range(2, 9), 16)})


def qrange(bits: int) -> tuple[int, int]:
    """Smallest and largest signed code, (-2^(b-1), 2^(b-1) - 1).

    Raises: ConfigError if bits is outside 2..8; 16 is for softmax outputs alone, whose codes are int16.

    >>> qrange(4)
    (-8, 7)
    """
    return _RANGES[bits]


def unsent(bits: int, clip: float) -> float:
    """How much of a tensor its codes leave out at most, as a share of its range: what is clipped, or a whole scale."""
    return max(1 - clip, clip / max(qrange(bits)[1], 1))


def qparams_from_range(
    minimum: Tensor, maximum: Tensor, bits: int, *, symmetric: bool = True, clip: float = 1.0
) -> QParams:
    """Scale and zero point that cover [clip * minimum, clip * maximum].

    Symmetric: scale = clip * max(|minimum|, |maximum|) / qmax.
    Asymmetric: scale = clip * (maximum - minimum) / (2^b - 1) with the range widened to hold zero,
    zero_point = qmin - round(clip * minimum / scale).
    """
    qmin, qmax = _RANGES[bits]
    if symmetric:
        scale = torch.maximum(minimum.abs(), maximum.abs()) * (clip / qmax)
        return QParams(scale.clamp_min(SMALLEST_SCALE), None)
    low, high = clip * minimum.clamp_max(0), clip * maximum.clamp_min(0)
    scale = ((high - low) / (qmax - qmin)).clamp_min(SMALLEST_SCALE)
    zero_point = (qmin - torch.round(low / scale)).clamp(qmin, qmax).to(torch.int32)
    return QParams(scale, zero_point)


def choose_qparams(
    x: Tensor, bits: int, granularity: str, *, symmetric: bool = True, clip: float = 1.0, channel_dim: int = -1
) -> QParams:
    """Scale and zero point of the values at hand: min-max times a clip ratio (MoDiff, arXiv:2506.22463, section 4).

    Broadcastable to x, scales above 0 also where it is all zeros; float16 and bfloat16 are measured in float32.
    Cost: one pass over x. No host sync.

    >>> choose_qparams(torch.tensor([-1.0, 1.0]), 8, "tensor").scale
    tensor([0.0079])
    """
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    shared = BY_NAME[granularity]
    if symmetric:
        largest = shared.reduce(x.abs(), channel_dim, torch.amax)
        return qparams_from_range(largest, largest, bits, clip=clip)
    return qparams_from_range(*extremes(x, shared, channel_dim), bits, symmetric=False, clip=clip)


def noise_of(scales: Sequence[QParams], runs: Sequence[int]) -> Tensor:
    """Mean square of the scales of each sample, over tokens or pixels and runs of channels: (N, 1, ...), or of all."""
    squares = [channels * q.scale.square() for channels, q in zip(runs, scales, strict=True)]
    rest = tuple(range(1, squares[0].dim())) or (0,)
    return torch.stack([square.mean(rest, keepdim=True) for square in squares]).sum(0) / sum(runs)


def quantize_tensor(x: Tensor, qparams: QParams, bits: int) -> Tensor:
    """Integer codes clamp(round(x / scale) + zero_point, qmin, qmax), int8, same shape as x; ties go to even.

    16 bits give int16.

    >>> quantize_tensor(torch.tensor([-9.0, 0.4, 2.6]), QParams(torch.tensor(1.0), None), 4)
    tensor([-8,  0,  3], dtype=torch.int8)
    """
    qmin, qmax = _RANGES[bits]
    codes = torch.round(x / qparams.scale)
    if qparams.zero_point is not None:
        codes = codes + qparams.zero_point
    return codes.clamp_(qmin, qmax).to(torch.int8 if bits <= 8 else torch.int16)


def dequantize(codes: Tensor, qparams: QParams) -> Tensor:
    """The values that codes stand for, scale * (code - zero_point), in the dtype of the scale.

    >>> dequantize(torch.tensor([-8, 3], dtype=torch.int8), QParams(torch.tensor(0.5), None))
    tensor([-4.0000,  1.5000])
    """
    values = codes.to(qparams.scale.dtype)
    if qparams.zero_point is not None:
        values = values - qparams.zero_point
    return values * qparams.scale


def fake_quantize(x: Tensor, qparams: QParams, bits: int) -> Tensor:
    """`dequantize(quantize_tensor(x))` in the dtype of x: the nearest value that the codes can express."""
    return dequantize(quantize_tensor(x, qparams, bits), qparams).to(x.dtype)
