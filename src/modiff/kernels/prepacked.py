"""Weights in the layout that a backend wants, made at first use and kept as long as the weight's memory lives."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Shelf(NamedTuple):
    """What was made of one storage; `storage` clears the shelf when the memory dies."""

    storage: weakref.ref[torch.UntypedStorage]
    made: dict[Hashable, tuple[int, tuple[Tensor, ...]]]


class Prepacked:
    """Keyed by the memory of a weight, not by the tensor object: views and `detach()` find the same entry.

    A write in place (seen through the version counter) makes the entry anew. Writes through `.data` leave no trace.
    """

    def __init__(self) -> None:
        self._shelves: dict[int, _Shelf] = {}

    def get(self, weight: Tensor, key: Hashable, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What `make` returns for this weight and key, at its first call or remembered."""
        shelf = self._shelf(weight.untyped_storage())
        version = 0 if weight.is_inference() else weight._version
        full = (weight.storage_offset(), weight.shape, weight.stride(), weight.dtype, key)
        found = shelf.made.get(full)
        if found is None or found[0] != version:
            found = shelf.made[full] = (version, make())
        return found[1]

    def bytes_held(self) -> int:
        """Memory of everything kept, for weights that are alive."""
        return sum(
            t.numel() * t.element_size()
            for shelf in self._shelves.values()
            for _, made in shelf.made.values()
            for t in made
        )

    def forget(self) -> None:
        """Free everything; it is made again at the next use."""
        self._shelves.clear()

    def _shelf(self, storage: Any) -> _Shelf:
        address = storage._cdata
        shelf = self._shelves.get(address)
        if shelf is None or shelf.storage() is not storage:
            shelf = _Shelf(weakref.ref(storage, lambda dead: self._drop(address, dead)), {})
            self._shelves[address] = shelf
        return shelf

    def _drop(self, address: int, dead: weakref.ref[torch.UntypedStorage]) -> None:
        shelf = self._shelves.get(address)
        if shelf is not None and shelf.storage is dead:
            del self._shelves[address]


PREPACKED = Prepacked()
"""Of all backends of this process."""
