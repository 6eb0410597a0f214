"""Whether a tensor was written since: one number for its bytes, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from modiff.kernels import native

Fingerprint = tuple[int, torch.dtype, torch.Size, tuple[int, ...]]
"""A number for the bytes, and how they are to be read."""


def fingerprint(x: Tensor) -> Fingerprint | None:
    """What changes with any element of x, but for one chance in 2^64; None where nobody can tell.

    That is for a tensor that is empty, not on the CPU or not dense, and on a machine without a C++ compiler.
    Cost: one pass over x.
    """
    if x.device.type != "cpu" or x.layout != torch.strided or x.data_ptr() == 0 or not _dense(x):
        return None
    library = native.load("fingerprint").library
    if library is None:
        return None
    number = library.modiff_fingerprint(x.data_ptr(), x.numel() * x.element_size(), torch.get_num_threads())
    return number, x.dtype, x.shape, x.stride()


def _dense(x: Tensor) -> bool:
    """Whether the elements lie side by side in memory, in any order of the axes."""
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    return x.permute(order).is_contiguous()
