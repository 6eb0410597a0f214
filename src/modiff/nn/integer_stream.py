"""The input side on real integers: residual, scale, codes and state in one pass over memory, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from modiff.config import ModulationConfig
from modiff.core.affine import QParams
from modiff.core.held_scales import HeldScales
from modiff.core.quantizer import Quantizer
from modiff.core.recursion import Message, State, step_gain
from modiff.kernels.encode import encode_residual
from modiff.kernels.input_fusion import InputFusion
from modiff.nn.byte_code import ByteCode, dense_parts, fronts_of, laid_otherwise
from modiff.nn.clock import Clock
from modiff.nn.stream import Stream


class IntegerStream(Stream):
    """As `Stream`, bit for bit, but a steady step sends bytes and writes the state in place.

    The state is kept in one dense tensor for each segment of the channels. The first step, and every step while scales
    are being measured, runs as in the simulation.
    """

    def __init__(self, quantizer: Quantizer, config: ModulationConfig, clock: Clock) -> None:
        self._parts: tuple[State, ...] = ()
        super().__init__(quantizer, config, clock)

    @property
    def state(self) -> State | None:
        """The input state as one tensor. Cost: nothing for one segment, else a copy."""
        if len(self._parts) < 2:
            return self._parts[0] if self._parts else None
        values, moves = [part.value for part in self._parts], [part.move for part in self._parts]
        moved = [move for move in moves if move is not None]
        channels = self.quantizer.channel_dim
        return State(torch.cat(values, channels), torch.cat(moved, channels) if moved else None)

    @state.setter
    def state(self, whole: State | None) -> None:
        if whole is None:
            self._parts = ()
            return
        values = self._dense(whole.value)
        moves = (None,) * len(values) if whole.move is None else self._dense(whole.move)
        self._parts = tuple(
            State(self._place("value", i, value), None if move is None else self._place("move", i, move))
            for i, (value, move) in enumerate(zip(values, moves, strict=True))
        )

    def _place(self, name: str, part: int, value: Tensor) -> Tensor:
        """Where this state was in the last trajectory, if the trajectory has buffers."""
        return value if self.key is None else self.clock.place((*self.key, name, part), value)

    def tensors(self) -> list[Tensor]:
        """Every tensor that the input state keeps."""
        return [t for part in self._parts for t in part if t is not None]

    def advance(self, value: Tensor, before: InputFusion | None = None) -> Message:
        """Code `value` into bytes and write the state in place; with `before` in the same pass over memory."""
        if not self._parts or self.quantizer.watching:
            return super().advance(value, before)
        quantizer, given = self.quantizer, self._given(value)
        gain = self._gain(value.device)
        fronts = fronts_of(value, before, quantizer.segments, quantizer.channel_dim)
        parts: list[tuple[Tensor, Tensor]] = []
        states: list[State] = []
        for index, ((x, front), state) in enumerate(zip(fronts, self._parts, strict=True)):
            held = self._laid(index, state, x, gain)
            arguments = (
                None if given is None else given[index],
                quantizer.bits,
                quantizer.config.clip,
                quantizer.granularity,
            )
            code = encode_residual if front is None else front.encode
            parts.append(code(x, held.value, *arguments, channel_dim=quantizer.channel_dim, move=held.move, gain=gain))
            states.append(held)
        self._parts = tuple(states)
        if isinstance(self.coding, HeldScales):
            self.coding.hold(tuple(QParams(scale, None) for _, scale in parts))
        return Message(None, (ByteCode(tuple(parts), 2 ** (quantizer.bits - 1), quantizer.channel_dim),), gain=gain)

    def _given(self, value: Tensor) -> tuple[Tensor, ...] | None:
        """The scales of this step where they are not to be measured."""
        if not isinstance(self.coding, HeldScales):
            return self.quantizer.scales(value)
        held = self.coding.given()
        return None if held is None else tuple(q.scale for q in held)

    def _gain(self, device: torch.device) -> Tensor | None:
        """The weight of the last move; 0 where there was none yet, None where the predictor holds."""
        if self.config.predictor == "hold":
            return None
        if self._parts[0].move is None:
            return torch.zeros((), device=device)
        return torch.as_tensor(step_gain(self.config, self.ratio()), dtype=torch.float32, device=device)

    def _laid(self, part: int, state: State, x: Tensor, gain: Tensor | None) -> State:
        """The state in the memory layout of x; moved once, when a trajectory begins."""
        value, move = state
        if laid_otherwise(value, x):
            value = self._place("laid", part, torch.empty_like(x, dtype=value.dtype).copy_(value))
        if gain is None:
            return State(value)
        if move is None:
            return State(value, self._place("move", part, torch.zeros_like(value)))
        if move.stride() != value.stride():
            move = self._place("laid move", part, torch.empty_like(value).copy_(move))
        return State(value, move)

    def _dense(self, x: Tensor) -> tuple[Tensor, ...]:
        return dense_parts(x, self.quantizer.segments, self.quantizer.channel_dim)
