"""The uniform affine quantizer in plain Python numbers (float64), written from the formulas; imports nothing of modiff.

symmetric:  s = clip * max|x| / (2^(b-1) - 1),            code = clamp(round(x / s), -2^(b-1), 2^(b-1) - 1)
asymmetric: s = clip * (max(x, 0) - min(x, 0)) / (2^b - 1), z = -2^(b-1) - round(clip * min(x, 0) / s),
            code = clamp(round(x / s) + z, ...)
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

FLOOR = 1e-12


class Quantized(NamedTuple):
    """codes: int64. value: what they stand for. step: the scale of each element. All of the shape of the input."""

    codes: Tensor
    value: Tensor
    step: Tensor


def group_of(index: tuple[int, ...], granularity: str, channel_dim: int) -> tuple[int, ...]:
    channel = channel_dim % len(index)
    if granularity == "tensor" or (granularity == "sample" and len(index) == 1):
        return ()
    if granularity == "sample":
        return index[:1]
    if granularity == "token":
        return index[:channel] + index[channel + 1 :]
    if granularity == "input_channel":
        return (index[channel],)
    raise ValueError(granularity)


def affine_parameters(values: list[float], bits: int, symmetric: bool, clip: float) -> tuple[float, int]:
    bottom, top = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if symmetric:
        return max(clip * max(abs(v) for v in values) / top, FLOOR), 0
    low, high = clip * min(0.0, *values), clip * max(0.0, *values)
    scale = max((high - low) / (2**bits - 1), FLOOR)
    return scale, min(max(bottom - round(low / scale), bottom), top)


def quantize(
    x: Tensor,
    bits: int,
    granularity: str = "tensor",
    *,
    symmetric: bool = True,
    clip: float = 1.0,
    channel_dim: int = -1,
) -> Quantized:
    x = x.double()
    indices = list(itertools.product(*map(range, x.shape)))
    groups: dict[tuple[int, ...], list[float]] = {}
    for index in indices:
        groups.setdefault(group_of(index, granularity, channel_dim), []).append(x[index].item())
    parameters = {name: affine_parameters(values, bits, symmetric, clip) for name, values in groups.items()}
    codes, value, step = torch.zeros(x.shape, dtype=torch.int64), torch.zeros_like(x), torch.zeros_like(x)
    bottom, top = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for index in indices:
        scale, zero = parameters[group_of(index, granularity, channel_dim)]
        code = min(max(round(x[index].item() / scale) + zero, bottom), top)
        codes[index], value[index], step[index] = code, scale * (code - zero), scale
    return Quantized(codes, value, step)


def quantize_runs(
    x: Tensor, runs: tuple[int, ...], bits: int, granularity: str, *, symmetric: bool, clip: float, channel_dim: int
) -> Quantized:
    options = {"symmetric": symmetric, "clip": clip, "channel_dim": channel_dim}
    parts = [quantize(part, bits, granularity, **options) for part in x.split(list(runs), channel_dim)]
    return Quantized(*(torch.cat(side, channel_dim) for side in zip(*parts, strict=True)))


def quantize_weight(weight: Tensor, bits: int | None, runs: tuple[int, ...] = ()) -> Tensor:
    """A weight with one symmetric scale per output channel and run of input channels."""
    if bits is None:
        return weight.double()
    runs = runs or (weight.shape[1],)
    rows = [
        quantize_runs(row[None], runs, bits, "tensor", symmetric=True, clip=1.0, channel_dim=1).value
        for row in weight.double()
    ]
    return torch.cat(rows)
