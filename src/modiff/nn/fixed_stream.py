"""The input side with its state in 16-bit integers."""

from __future__ import annotations

import torch
from torch import Tensor

from modiff.config import ModulationConfig
from modiff.core.quantizer import Quantizer
from modiff.core.recursion import Message, State
from modiff.kernels.fixed_point import FixedState, encode_fixed, start
from modiff.kernels.input_fusion import InputFusion
from modiff.nn.byte_code import ByteCode, dense_parts, fronts_of, laid_otherwise
from modiff.nn.clock import Clock
from modiff.nn.stream import Stream

HEADROOM = 1.25
"""How much larger than at its start a state may become before it starts again."""


class FixedStream(Stream):
    """n_t = n_{t+1} + m_t q_t: exact, two bytes an element. An input that outgrows 16 bits starts again.

    The output sides start from what the integers stand for, so that a_anchor = â there and the law holds.
    """

    def __init__(self, quantizer: Quantizer, config: ModulationConfig, clock: Clock) -> None:
        self._parts: tuple[FixedState, ...] = ()
        self._clipped = torch.zeros(1, dtype=torch.int32)
        self._outgrown = False
        super().__init__(quantizer, config, clock)

    @property
    def state(self) -> State | None:
        """What the integers stand for. Cost: a pass over them."""
        return State(self._value()) if self._parts else None

    @state.setter
    def state(self, whole: State | None) -> None:
        self._parts = () if whole is None else tuple(start(part, HEADROOM) for part in self._dense(whole.value))

    def tensors(self) -> list[Tensor]:
        """Every tensor that the input state keeps."""
        return [t for part in self._parts for t in part]

    def advance(self, value: Tensor, before: InputFusion | None = None) -> Message:
        """Code `value` into bytes and write the integers in place."""
        if self._outgrown or not self._parts:
            self._parts, self._outgrown = (), False
            message = super().advance(value, before)
            return message._replace(anchor=self._value())
        quantizer = self.quantizer
        self._clipped = self._clipped.to(value.device).zero_()
        parts: list[tuple[Tensor, Tensor]] = []
        states: list[FixedState] = []
        fronts = fronts_of(value, before, quantizer.segments, quantizer.channel_dim)
        for (x, front), held in zip(fronts, self._parts, strict=True):
            state = held
            if laid_otherwise(held.n, x):
                state = held._replace(n=torch.empty_like(x, dtype=torch.int16).copy_(held.n))
            states.append(state)
            parts.append(self._code(x, front, state))
        self._parts = tuple(states)
        self._outgrown = bool(self._clipped > 0)  # what was cut is not lost: the next step starts from the input itself
        return Message(None, (ByteCode(tuple(parts), 2 ** (quantizer.bits - 1), quantizer.channel_dim),))

    def _code(self, x: Tensor, front: InputFusion | None, state: FixedState) -> tuple[Tensor, Tensor]:
        quantizer = self.quantizer
        arguments, channel_dim = (quantizer.bits, quantizer.config.clip, quantizer.granularity), quantizer.channel_dim
        if front is None:
            return encode_fixed(x, state, *arguments, channel_dim=channel_dim, clipped=self._clipped)
        return front.encode(x, state, None, *arguments, channel_dim=channel_dim, clipped=self._clipped)

    def _value(self) -> Tensor:
        values = [part.value() for part in self._parts]
        return values[0] if len(values) == 1 else torch.cat(values, self.quantizer.channel_dim)

    def _dense(self, x: Tensor) -> tuple[Tensor, ...]:
        return dense_parts(x, self.quantizer.segments, self.quantizer.channel_dim)
