"""Kernel distance: the squared maximum mean discrepancy of two sets of features, without the bias of small sets."""

from __future__ import annotations

from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from modiff.errors import ConfigError
from modiff.evaluate.metrics.rows import as_rows, check_same_dimension


class KernelDistance(TypedDict):
    """Mean and population standard deviation over the subsets. The std is that of one subset, not of the mean."""

    mean: float
    std: float
    subsets: int
    subset_size: int


def kernel_distance(
    first: Tensor | np.ndarray,
    second: Tensor | np.ndarray,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> KernelDistance:
    """The mean of `polynomial_mmd` over random subsets; with Inception features the KID (arXiv:1801.01401).

    Subsets are drawn from each set without replacement, anew each time, by a generator of `seed`. A subset as large as
    the set would be the same one each time; then ask for subsets=1, whose std is 0 and says nothing.

    Args:
        first, second: features (N, D) and (M, D), N and M at least subset_size.
    Raises: ConfigError for different dimensions, sets smaller than a subset, or subsets of fewer than 2.
    Cost: subsets * 3 subset_size² D multiply-adds, 24 subset_size² bytes.
    """
    left, right = as_rows(first, "kernel_distance"), as_rows(second, "kernel_distance")
    check_same_dimension(left.shape[1], right.shape[1], "kernel_distance")
    smallest = min(len(left), len(right))
    if type(subset_size) is not int or not 2 <= subset_size <= smallest:
        raise ConfigError(
            f"kernel_distance: expected a subset_size of 2 to {smallest} for sets of {len(left)} and {len(right)}, got "
            f"{subset_size!r}. Subsets are drawn without replacement. Use a smaller one or more images."
        )
    if type(subsets) is not int or subsets < 1:
        raise ConfigError(
            f"kernel_distance: expected 1 or more subsets, got {subsets!r}. Their mean is the result. Use subsets=100."
        )
    if subset_size == smallest == max(len(left), len(right)) and subsets > 1:
        raise ConfigError(
            f"kernel_distance: expected subsets smaller than the sets of {smallest}, got {subsets} of the full size. "
            f"They would all be equal. Use subsets=1, or subset_size={max(smallest // 2, 2)}."
        )
    generator = torch.Generator().manual_seed(seed)
    found = [
        polynomial_mmd(_subset(left, subset_size, generator), _subset(right, subset_size, generator))
        for _ in range(subsets)
    ]
    return {"mean": float(np.mean(found)), "std": float(np.std(found)), "subsets": subsets, "subset_size": subset_size}


def polynomial_mmd(first: Tensor | np.ndarray, second: Tensor | np.ndarray) -> float:
    """The unbiased estimate of the squared MMD with k(x, y) = (xᵀy / D + 1)³:

        mean_{i≠j} k(x_i, x_j) + mean_{i≠j} k(y_i, y_j) - 2 mean_{i,j} k(x_i, y_j)

    Its expectation over sets of one distribution is 0, so it is often negative there.
    Raises: ConfigError for different dimensions or fewer than 2 vectors in a set.
    Cost: (N² + M² + N M) (D multiply-adds and 8 bytes).

    >>> polynomial_mmd(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [1.0]]))  # 1 + 1 - 2 (1 + 1 + 1 + 8) / 4
    -3.5
    """
    left, right = as_rows(first, "polynomial_mmd"), as_rows(second, "polynomial_mmd")
    check_same_dimension(left.shape[1], right.shape[1], "polynomial_mmd")
    if min(len(left), len(right)) < 2:
        raise ConfigError(
            f"polynomial_mmd: expected 2 or more vectors in each set, got {len(left)} and {len(right)}. "
            "The estimate averages over pairs. Give more images."
        )
    return _among(left) + _among(right) - 2 * float(_kernel(left, right).mean())


def _kernel(left: Tensor, right: Tensor) -> Tensor:
    return (left @ right.T / left.shape[1] + 1) ** 3


def _among(rows: Tensor) -> float:
    """The mean over pairs of two different vectors."""
    kernel = _kernel(rows, rows)
    return float((kernel.sum() - kernel.trace()) / (len(rows) * (len(rows) - 1)))


def _subset(rows: Tensor, size: int, generator: torch.Generator) -> Tensor:
    return rows[torch.randperm(len(rows), generator=generator)[:size]]
