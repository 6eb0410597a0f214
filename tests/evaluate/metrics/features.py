"""Sets of feature vectors for tests of metrics."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor


def gaussian(seed: int, count: int, mean: Tensor, covariance: Tensor) -> Tensor:
    """Vectors (count, D) in float64 from one Gaussian."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, len(mean), generator=generator, dtype=torch.float64)
    return mean + noise @ torch.linalg.cholesky(covariance).T


def rotation(seed: int, dimension: int) -> Tensor:
    """A random orthogonal matrix."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(dimension, dimension, generator=generator, dtype=torch.float64)).Q


@st.composite
def feature_sets(draw: st.DrawFn, dimension: int | None = None, smallest: int = 2, largest: int = 12) -> Tensor:
    """(N, D) float64, of any offset and spread, sometimes with equal rows."""
    width = dimension or draw(st.integers(1, 5))
    count = draw(st.integers(smallest, largest))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows = torch.randn(count, width, generator=generator, dtype=torch.float64)
    rows = rows * draw(st.sampled_from([1e-3, 1.0, 50.0])) + draw(st.sampled_from([0.0, 1.0, -300.0]))
    return rows[torch.randint(count, (count,), generator=generator)] if draw(st.booleans()) else rows
