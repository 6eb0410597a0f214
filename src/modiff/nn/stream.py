"""The input side of modulated layers: who reads which tensor, and the input state that belongs to it."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from modiff.config import ModulationConfig
from modiff.core.held_scales import HeldScales
from modiff.core.quantizer import Quantizer
from modiff.core.recursion import Message, State, encode
from modiff.errors import StateError
from modiff.kernels.input_fusion import InputFusion
from modiff.nn.clock import Clock
from modiff.nn.source import Source

_NUMBERS = itertools.count()
Key = tuple[str, int]
"""(context, how many times the layer was called before in this evaluation)."""


class Stream:
    """One tensor's input state through the trajectory, and the message that this evaluation sent for it.

    count: messages sent so far; a reader that missed one cannot go on. readers: how many layers read it. open: others
    may join. key: the same for this stream in every trajectory, None for one that belongs to no group. turn: the step
    at which it anchors again first where anchors are staggered, up to a multiple of `reanchor_every`.
    """

    def __init__(self, quantizer: Quantizer, config: ModulationConfig, clock: Clock) -> None:
        self.quantizer, self.config, self.clock = quantizer, config, clock
        self.coding = HeldScales(quantizer) if quantizer.config.refresh_every > 1 else quantizer
        self.state: State | None = None
        self.message: Message | None = None
        self.count, self.readers, self.open, self.turn = 0, 1, False, 0
        self.key: tuple[int, int] | None = None
        self.tick = -1
        self._held: tuple[torch.Size, torch.device] | None = None
        self._source: Source | None = None

    def begins(self, x: Tensor, place: int | None = None) -> bool:
        """True if the states started in this evaluation, and from this very tensor, unchanged since."""
        if self.message is None or not self.message.starts or self.tick != self.clock.tick or self._source is None:
            return False
        return self._source.begins(x, place)

    def read(
        self,
        where: str,
        x: Tensor,
        value: Tensor,
        before: InputFusion | None = None,
        place: int | None = None,
    ) -> Message:
        """The message for `x`: coded by the first reader of the evaluation, the same for all others.

        Args:
            x, place: the tensor as the layer got it; they tell who shares, as `Source` has them.
            value: x itself, or x rotated: what is coded.
            before: what `value` passes through before it is coded, of its shape; the same for all readers.
        Raises: StateError if shape or device changed inside the trajectory, or the readers no longer agree.
        """
        if self.tick == self.clock.tick and self.message is not None:
            if self._source is None or not self._source.carries(x, place):
                raise StateError(
                    f"{where}: expected the tensor that its group read before, got another one. These layers read one "
                    "tensor at the first step and no longer do. Use ModiffConfig(share_residuals='off')."
                )
            return self.message
        every, turn = self.config.reanchor_every, self.turn if self.config.stagger else 0
        if every and (self.clock.step - turn) % every == 0:
            self.state = self._held = None
            if isinstance(self.coding, HeldScales):
                self.coding.restart()
        self._check(where, value)
        self.message = self.advance(value, before)
        self._held = value.shape, value.device
        asked = self.readers > 1 or (self.open and not self.count)
        self.tick, self._source = self.clock.tick, Source(x, place, asked)
        self.count += 1
        return self.message

    def tensors(self) -> list[Tensor]:
        """Every tensor that the input state keeps."""
        return [] if self.state is None else [t for t in self.state if t is not None]

    def advance(self, value: Tensor, before: InputFusion | None = None) -> Message:
        """Code `value`, or what it is behind `before`, and move the state on."""
        value = value if before is None else before.compute(value)
        message, self.state = encode(value, self.state, self.coding, self.config, self.ratio())
        return message

    def ratio(self) -> Tensor | float:
        """Size of this step over the last one, on the device of the state."""
        if self.config.predictor == "hold":
            return 1.0
        ratio = self.clock.ratio
        return ratio.to(self._held[1]) if isinstance(ratio, Tensor) and self._held is not None else ratio

    def _check(self, where: str, x: Tensor) -> None:
        if self._held is not None and self._held != (x.shape, x.device):
            shape, device = self._held
            raise StateError(
                f"{where}: expected an input of shape {tuple(shape)} on {device}, got {tuple(x.shape)} on "
                f"{x.device}. The batch or image size changed inside one trajectory. "
                "Wrap each generation in its own `with modiff.trajectory(model):`."
            )


class Inputs:
    """The streams of a group of layers; a group of one is the usual case.

    At the step where states start, a layer joins the stream of the group that carries its very input, or opens one.
    turn: the number of the group in its model: the groups anchor again in turn where anchors are staggered.
    """

    def __init__(
        self, quantizer: Quantizer, config: ModulationConfig, clock: Clock, stream: type[Stream] = Stream
    ) -> None:
        self.quantizer, self.config, self.clock, self.stream = quantizer, config, clock, stream
        self.streams: list[Stream] = []
        self.shared, self.turn = False, 0
        self.number = next(_NUMBERS)
        clock.on_reset(self.forget)

    def forget(self) -> None:
        """Drop all streams, and with them the input states."""
        self.streams.clear()

    def stream_for(self, x: Tensor, place: int | None = None) -> Stream:
        """The stream that carries `x` in this evaluation, the newest if several do; a new one if there is none."""
        for stream in reversed(self.streams):
            if stream.begins(x, place):
                stream.readers += 1
                return stream
        found = self.stream(self.quantizer, self.config, self.clock)
        found.key, found.open, found.turn = (self.number, len(self.streams)), self.shared, self.turn
        self.streams.append(found)
        return found
