"""A CUDA graph on the CPU: the operators of one run, repeated on the same tensors without the Python around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)


class Waits(Exception):
    """An operator that waits for the device: a capture fails there."""


class Recorder(TorchDispatchMode):
    """Use as a context: operators run, and are noted. Kernels that torch does not dispatch are not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITS:
            raise Waits(str(func))
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        """Every operator again: what it reads and where it writes lies where it lay."""
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
