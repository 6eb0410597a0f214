"""Block-Hadamard rotation of channels: spreads outliers over a block so that a shared scale fits all its channels.

y = W x = (W R)(R x) for the orthonormal, symmetric R = diag(H_b, ..., H_b) / sqrt(b): the weights take R once, the
input takes it on each call, and everything between (residual, codes, states) lives in the rotated domain.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor


class RotatedRun(NamedTuple):
    """`channels` neighbouring channels, rotated in blocks of `block` (1: not at all)."""

    channels: int
    block: int


def hadamard_block(channels: int, largest: int = 64) -> int:
    """The block size for a number of channels: the largest power of two that divides them, at most `largest`.

    >>> hadamard_block(192), hadamard_block(96), hadamard_block(7)
    (64, 32, 1)
    """
    return min(channels & -channels, largest)


def rotated_runs(channels: tuple[int, ...], groups: int = 1, largest: int = 64) -> tuple[RotatedRun, ...]:
    """A rotated run for each run of channels; blocks never cross a run or a convolution group."""
    return tuple(RotatedRun(c, hadamard_block(c // groups, largest)) for c in channels)


@functools.lru_cache(maxsize=32)
def _hadamard(block: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sylvester's construction, H_2b = [[H, H], [H, -H]], over sqrt(b): symmetric and its own inverse."""
    with torch.inference_mode(mode=False):  # it is kept, and may be asked for gradients later
        matrix = torch.ones(1, 1, dtype=torch.float64, device="cpu")
        while matrix.shape[0] < block:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        return (matrix / math.sqrt(block)).to(device, dtype)


def rotate(x: Tensor, runs: tuple[RotatedRun, ...], dim: int) -> Tensor:
    """R x along axis `dim`; applying it twice gives x back. Same shape and dtype.

    Cost: `block` multiply-adds an element.

    >>> rotate(torch.tensor([3.0, 1.0]), (RotatedRun(2, 2),), 0)
    tensor([2.8284, 1.4142])
    """
    if len(runs) == 1:
        return _rotate_blocks(x, runs[0].block, dim)
    values = x.split([run.channels for run in runs], dim)
    return torch.cat([_rotate_blocks(value, run.block, dim) for value, run in zip(values, runs, strict=True)], dim)


def _rotate_blocks(x: Tensor, block: int, dim: int) -> Tensor:
    if block == 1:
        return x
    matrix = _hadamard(block, x.dtype, x.device)
    blocks = x.unflatten(dim, (-1, block))
    axis = dim % x.dim() + 1  # the axis inside a block
    if axis == blocks.dim() - 1:
        return (blocks @ matrix).reshape(x.shape)
    return (matrix @ blocks.flatten(axis + 1)).reshape(x.shape)
