"""How layers that read one tensor know that it is one."""

import weakref

from torch import Tensor
from torch._C._functorch import maybe_current_level
from torch.autograd import forward_ad

from modiff.kernels.native import fingerprint
from modiff.nn.traced import refuse_transform
from modiff.nn.weight import version_of


class Source:
    """A tensor as its first reader got it.

    In eager execution a tensor is recognized by identity and version counter. Inductor reuses buffers and inference
    tensors have no version: there the read number of the graph tells, and without one the bytes, where a layer joins at
    the same address. A write through `.data` between two readers is not seen.

    read: None in eager execution; in a graph the number of what is read, negative for its first reader in each run of
    it, 0 where it has none. shared: whether other readers will come; otherwise no bytes are looked at.
    """

    __slots__ = ("address", "bytes", "read", "tensor", "version")

    def __init__(self, x: Tensor, read: int | None, shared: bool, where: str) -> None:
        if maybe_current_level() is not None or forward_ad._current_level >= 0:  # here, as a call more costs time
            refuse_transform(where)
        self.tensor, self.read, self.address = weakref.ref(x), read, x.data_ptr()
        self.version = version_of(x)
        self.bytes = fingerprint(x) if shared and _silent(x, read) else None

    def begins(self, x: Tensor, read: int | None) -> bool:
        """Whether a layer that reads x for the first time reads this tensor. False where nobody can tell."""
        if (read is None and self.tensor() is None) or (read is not None and read < 0):
            return False  # the tensor is gone, or nothing was made of it yet in this run of the graph
        return self.carries(x, read) and (not _silent(x, read) or self.address == x.data_ptr())

    def carries(self, x: Tensor, read: int | None) -> bool:
        """Whether x, which a reader of this tensor was given, is it, unchanged since."""
        if (None if read is None else abs(read)) != (None if self.read is None else abs(self.read)):
            return False
        if _silent(x, read):
            return self.bytes is not None and self.bytes == fingerprint(x)
        return read is not None or (self.tensor() is x and self.version == version_of(x))


def _silent(x: Tensor, read: int | None) -> bool:
    return read == 0 or (read is None and x.is_inference())
