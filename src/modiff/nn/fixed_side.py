"""The output side with its state in 16-bit integers."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from modiff.core.recursion import Message, State
from modiff.kernels.fixed_point import FixedState, start
from modiff.nn.byte_code import ByteCode
from modiff.nn.fixed_stream import HEADROOM
from modiff.nn.integer import IntegerSide
from modiff.nn.stream import Stream


class FixedSide(IntegerSide):
    """n_t = n_{t+1} + round(A(q_t) / grid), ô_t = grid n_t. A state that outgrows 16 bits anchors again at â_t.

    Each step rounds to the grid, and no step repairs that: the relative error is some 0.001 after 200 steps.
    """

    def receive(
        self, message: Message, state: State | FixedState | None, stream: Stream, dtype: torch.dtype
    ) -> tuple[FixedState, Tensor]:
        """The next output state, and the layer's output in `dtype`."""
        code = message.codes[0] if message.codes else None
        if not (isinstance(code, ByteCode) and isinstance(state, FixedState)):
            return self._begun(self.accumulated(message, None).value, dtype)
        clipped = torch.zeros(1, dtype=torch.int32, device=state.n.device)
        outputs = [
            kernel.step(state, codes, scale, dtype, clipped)
            for kernel, (codes, scale) in zip(self.kernels, code.parts, strict=True)
        ]
        # NaN leaves no trace in the integers of the state: that of an earlier part is kept in the output
        output = functools.reduce(lambda before, now: torch.where(before.isnan(), before, now), outputs)
        if not bool(clipped > 0):
            return state, output
        held = Message(None if stream.state is None else stream.state.value, (), starts=True)
        return self._begun(self.accumulated(held, None).value, dtype)

    def _begun(self, value: Tensor, dtype: torch.dtype) -> tuple[FixedState, Tensor]:
        return start(value, HEADROOM), value.to(dtype, copy=True)
