"""Which tensor a message was made from, and how the other layers that read it know it again."""

from __future__ import annotations

import weakref

from torch import Tensor

from modiff.kernels.native import fingerprint


class Source:
    """A tensor as its first reader got it.

    In eager execution the object and its version tell it again. Both are silent where a compiled graph keeps one tensor
    after the other in one object, and for inference tensors, which have no version. There the place in the graph tells,
    and without one the bytes, where a layer joins at the same address.

    Args:
        place: None in eager execution; in a graph the number of what is read, negative for the first that reads it in
            each run of the graph, 0 where it has none.
        asked: whether other readers will ask; else the bytes are not looked at.
    Cost: a pass over x where its bytes are looked at, here and for each reader that asks.
    """

    __slots__ = ("address", "bytes", "place", "tensor", "version")

    def __init__(self, x: Tensor, place: int | None, asked: bool) -> None:
        self.tensor, self.version, self.address = weakref.ref(x), version_of(x), x.data_ptr()
        self.place = place
        self.bytes = fingerprint(x) if asked and _silent(x, place) else None

    def begins(self, x: Tensor, place: int | None) -> bool:
        """Whether a layer that reads x for the first time reads this tensor. False where nobody can tell."""
        if place is not None and place < 0:
            return False  # nothing was made of it yet in this run of the graph
        if place is None and self.tensor() is None:
            return False
        return self.carries(x, place) and (not _silent(x, place) or self.address == x.data_ptr())

    def carries(self, x: Tensor, place: int | None) -> bool:
        """Whether x, which a reader of this tensor was given, is it, unchanged since."""
        if (place is None) != (self.place is None):
            return False
        if place is not None and self.place is not None and abs(place) != abs(self.place):
            return False
        if _silent(x, place):
            return self.bytes is not None and self.bytes == fingerprint(x)
        return place is not None or (self.tensor() is x and self.version == version_of(x))


def version_of(x: Tensor) -> int:
    """How often a tensor was written in place; inference tensors do not count, and read 0."""
    return 0 if x.is_inference() else x._version


def _silent(x: Tensor, place: int | None) -> bool:
    """Whether object and version say nothing, and no place does."""
    return place == 0 or (place is None and x.is_inference())
