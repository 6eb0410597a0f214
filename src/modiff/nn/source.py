"""Which tensor a message was made from, and how the other layers that read it know it again."""

from __future__ import annotations

import weakref

from torch import Tensor

from modiff.kernels.fingerprint import Fingerprint, fingerprint

Key = tuple[str, int]
"""(context, how many times the layer was called before in this evaluation)."""


class Source:
    """A tensor as its first reader got it.

    In eager execution the object and its version tell it again. Both are silent where a compiled graph keeps one tensor
    after the other in one object, and for inference tensors, which have no version. There the place in the graph tells,
    and without one address and bytes.

    Args:
        place: None in eager execution; in a graph the number of what is read, 0 if it has none.
        key: of the reader: a graph that runs twice in an evaluation reads other tensors at the same place.
        asked: whether other readers will ask; else the bytes are not looked at.
    Cost: a pass over x where its bytes are looked at, here and for each reader that asks.
    """

    __slots__ = ("bytes", "key", "place", "tensor", "version")

    def __init__(self, x: Tensor, place: int | None, key: Key, asked: bool) -> None:
        self.tensor, self.version = weakref.ref(x), version_of(x)
        self.place, self.key = place, key
        self.bytes = _bytes(x) if asked and _silent(x, place) else None

    def carries(self, x: Tensor, place: int | None, key: Key) -> bool:
        """Whether x is that tensor, unchanged since. False where nobody can tell."""
        if place != self.place:
            return False
        if place:
            return key == self.key
        if _silent(x, place):
            return self.bytes is not None and self.bytes == _bytes(x)
        return self.tensor() is x and self.version == version_of(x)


def version_of(x: Tensor) -> int:
    """How often a tensor was written in place; inference tensors do not count, and read 0."""
    return 0 if x.is_inference() else x._version


def _silent(x: Tensor, place: int | None) -> bool:
    """Whether object and version say nothing, and no place does."""
    return place == 0 or (place is None and x.is_inference())


def _bytes(x: Tensor) -> tuple[int, Fingerprint] | None:
    found = fingerprint(x)
    return None if found is None else (x.data_ptr(), found)
