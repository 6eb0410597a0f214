"""The contract of a backend, and the memory in which backends keep weights in the layout they want.

A backend is an object with a name that says which problems it runs exactly, and runs them. Only `unsupported` and
`sums` must be written; the rest follows from them, and a backend overrides what its operators do better.
`dispatch.register_backend` adds one.
"""

import weakref
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modiff.kernels.epilogue import Integers, add_sent
from modiff.kernels.isa import Isa
from modiff.kernels.layout import Geometry, empty_output, output_shape, weight_codes
from modiff.kernels.problem import Problem

Step = Callable[[Tensor, Tensor, Tensor, Tensor, Integers], None]
"""(state, codes, scale, output, integers) -> None: `Backend.step` of one operator."""


class Operator(NamedTuple):
    """A layer's weight as backends read it.

    weight: int8 codes (O, I / groups, ...), or uint8 with two 4-bit codes in a byte; shape: of the codes.
    weight_scale: float32, (O, 1, ...). weight_max: largest magnitude among the weight codes. bits: of the activation.
    axes: of the convolution, 2 or 3; 0 for a linear layer. `Kernel` sees to it that no backend meets one axis.
    Codes of the activation are uint8, (..., I) without axes, otherwise (N, I, ...); zero = 2^(bits - 1).
    """

    weight: Tensor
    shape: tuple[int, ...]
    weight_scale: Tensor
    geometry: Geometry
    axes: int
    bits: int
    weight_max: int

    @property
    def zero_point(self) -> int:
        """The byte that stands for zero: as low as the bits allow, so that sums of few bits stay small."""
        return 2 ** (self.bits - 1)

    def weight_codes(self) -> Tensor:
        """The int8 codes of the weight, (O, I / groups, ...)."""
        return weight_codes(self.weight, self.shape)

    def new_output(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Memory for the output of these codes, channels innermost."""
        return empty_output(codes, output_shape(codes.shape, self.shape, self.geometry), self.axes, dtype)


class Backend:
    """Runs ô += s * s_w[o] * sum (code - zero) * weight code, with sums that are exact.

    name: by which reports and `Kernel(backend=...)` call it. devices: where its codes may lie; empty: anywhere.
    slow: what makes it slow, for the warning where it is chosen for lack of a faster one; empty: nothing.
    """

    name = ""
    devices: tuple[str, ...] = ()
    slow = ""

    def unsupported(self, problem: Problem, isa: Isa) -> str:
        """Why this backend must not run the problem; empty if its sums are exact, by the bound of its weights."""
        raise NotImplementedError

    def broken(self, isa: Isa) -> str:
        """What is wrong with this machine or this torch, so that users are warned; empty if nothing is."""
        return ""

    def reason(self, problem: Problem, isa: Isa) -> str:
        """One line for the report where this backend is chosen."""
        return self.slow or self.name

    def sums(self, operator: Operator, codes: Tensor) -> Tensor:
        """sum (code - zero) * weight code, in any dtype; int32 and float64 hold all, float32 rounds those over 2^24."""
        raise NotImplementedError

    def scaled(self, operator: Operator, codes: Tensor) -> Tensor:
        """weight scale * sums, float32: what is left is the scale of the codes."""
        return self.sums(operator, codes).to(torch.float32).mul_(operator.weight_scale)

    def accumulate(self, operator: Operator, output: Tensor, codes: Tensor, scale: Tensor) -> None:
        """output += scale * weight scale * sums, in float32, rounded once to the dtype of `output`."""
        sent = self.scaled(operator, codes)
        if output.dtype == sent.dtype:
            output.addcmul_(sent, scale)
        else:
            output.add_(sent.mul_(scale))

    def step(
        self, operator: Operator, state: Tensor, codes: Tensor, scale: Tensor, output: Tensor, integers: Integers = None
    ) -> None:
        """`accumulate` into the state, and the new state into `output`, of another dtype perhaps."""
        add_sent(state, integers, self.scaled(operator, codes), scale, operator.axes, output)

    def prepared_step(
        self, operator: Operator, state: Tensor, codes: Tensor, scale: Tensor, output: Tensor, integers: Integers
    ) -> Step | None:
        """`step` for tensors whose types and layouts are those of these, which it does not look at; None: no faster."""
        return None

    def compute(
        self, operator: Operator, codes: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """scale * weight scale * sums + bias."""
        output = operator.new_output(codes, dtype)
        if bias is None:
            output.zero_()
        else:
            output.copy_(bias.reshape(-1, *[1] * operator.axes).expand_as(output))
        self.accumulate(operator, output, codes, scale)
        return output


class Prepacked:
    """Weights in the layout that a backend wants, made at first use and kept as long as the weight's memory lives.

    Views and `detach()` find the same entry. A write in place makes it again, one through `.data` leaves no trace.
    """

    def __init__(self) -> None:
        self._made: dict[int, dict[Hashable, tuple[int, tuple[Tensor, ...]]]] = {}

    def get(self, weight: Tensor, key: Hashable, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What `make` returns for this weight and key, at its first call or remembered."""
        storage: Any = weight.untyped_storage()
        made = self._made.get(storage._cdata)
        if made is None:
            made = self._made[storage._cdata] = {}
            weakref.finalize(storage, self._made.pop, storage._cdata).atexit = False  # before the address is free
        version = 0 if weight.is_inference() else weight._version
        full = (weight.storage_offset(), weight.shape, weight.stride(), weight.dtype, key)
        entry = made.get(full)
        if entry is None or entry[0] != version:
            entry = made[full] = (version, make())
        return entry[1]

    def bytes_of(self, weight: Tensor) -> int:
        """Memory of everything made of this weight so far."""
        return _bytes(self._made.get(weight.untyped_storage()._cdata, {}))

    def bytes_held(self) -> int:
        """Memory of everything kept, for weights that are alive."""
        return sum(map(_bytes, self._made.values()))


def _bytes(made: dict[Hashable, tuple[int, tuple[Tensor, ...]]]) -> int:
    return sum({id(t): t.nbytes for _, tensors in made.values() for t in tensors}.values())  # some share a tensor


PREPACKED = Prepacked()
"""Of all backends of this process."""
