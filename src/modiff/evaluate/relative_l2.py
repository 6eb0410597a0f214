"""How far a result is from its reference, in units of the reference."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from modiff.errors import ConfigError


def relative_l2(value: Tensor | np.ndarray, reference: Tensor | np.ndarray) -> float:
    """||value - reference|| / ||reference||, over all elements together, computed in float64.

    Args:
        value, reference: tensors or arrays of one shape; any real dtype, any units.
    Returns: 0 for equal ones, about 1.4 for unrelated ones of mean 0; NaN if either holds NaN.
    Raises: ConfigError if the shapes differ, there is nothing to compare, or the reference is all zeros.

    >>> relative_l2(torch.tensor([3.0, 3.0]), torch.tensor([3.0, 4.0]))
    0.2
    """
    got, wanted = as_float64(value, "relative_l2"), as_float64(reference, "relative_l2")
    check_same_shape(got, wanted, "relative_l2")
    size = wanted.norm()
    if size == 0:
        raise ConfigError(
            "relative_l2: expected a reference that is not zero, got zeros. An error cannot be a share of nothing. "
            "Compare the norm of the difference instead."
        )
    return float((got - wanted).norm() / size)


def as_float64(value: Tensor | np.ndarray, where: str) -> Tensor:
    """The values in double precision. Raises: ConfigError for complex ones."""
    tensor = torch.as_tensor(value).detach()
    if tensor.is_complex():
        raise ConfigError(f"{where}: expected real values, got {tensor.dtype}. Give the real part or the magnitude.")
    return tensor.double()


def check_same_shape(value: Tensor, reference: Tensor, where: str) -> None:
    """Raise the ConfigError of two shapes that differ, or of nothing at all."""
    if value.shape != reference.shape or value.numel() == 0:
        raise ConfigError(
            f"{where}: expected two equal shapes with at least one element, got {tuple(value.shape)} and "
            f"{tuple(reference.shape)}. Broadcasting would compare what does not belong together. Reshape one of them."
        )
