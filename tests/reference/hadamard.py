"""The block-Hadamard rotation as an explicit matrix from Walsh's formula; imports nothing of modiff."""

import torch
from torch import Tensor


def hadamard(block: int) -> Tensor:
    """H[i, j] = (-1)^(number of ones in i AND j) / sqrt(block), float64."""
    signs = [[(-1) ** (i & j).bit_count() for j in range(block)] for i in range(block)]
    return torch.tensor(signs, dtype=torch.float64) / block**0.5


def rotation(runs: tuple[int, ...], limit: int, groups: int = 1) -> Tensor:
    """The whole (channels x channels) matrix: blocks never cross a run or a group."""
    matrix, first = torch.zeros(sum(runs), sum(runs), dtype=torch.float64), 0
    for run in runs:
        block = max(b for b in (1, 2, 4, 8, 16, 32, 64) if b <= limit and run // groups % b == 0)
        for start in range(first, first + run, block):
            matrix[start : start + block, start : start + block] = hadamard(block)
        first += run
    return matrix


def along(x: Tensor, matrix: Tensor, dim: int) -> Tensor:
    return (x.double().movedim(dim, -1) @ matrix.T).movedim(-1, dim)
