"""States at the same place in memory in every trajectory: what a recorded step (a CUDA graph) reads and writes."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor


class Buffers:
    """The tensors that states had in the last trajectory, taken again by the states of the next one.

    Without buffers states are freed when a trajectory ends. With them they stay, and a new trajectory writes its
    first step into them: bit for bit the same values, without an allocation. version: grows whenever a tensor is at a
    new place, so that what was recorded with the old ones is void.

    >>> buffers = Buffers()
    >>> first = buffers.place("a", torch.ones(2))
    >>> buffers.place("a", torch.zeros(2)) is first, first
    (True, tensor([0., 0.]))
    """

    def __init__(self) -> None:
        self.version = 0
        self._held: dict[Hashable, Tensor] = {}

    def place(self, key: Hashable, value: Tensor) -> Tensor:
        """The values of `value` in the tensor kept under `key`; `value` itself, kept from now on, where none fits."""
        held = self._held.get(key)
        if held is not None and _alike(held, value) and (torch.is_inference_mode_enabled() or not held.is_inference()):
            return held if held is value else held.copy_(value)
        self._held[key] = value
        self.version += 1
        return value

    def bytes_held(self) -> int:
        """Of all tensors kept, in a trajectory or between two."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self._held.values()}
        return sum(storages.values())


def _alike(x: Tensor, y: Tensor) -> bool:
    return (x.shape, x.stride(), x.dtype, x.device) == (y.shape, y.stride(), y.dtype, y.device)
