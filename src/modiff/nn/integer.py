"""The output side of a layer on real integers: ô_t += s s_w[o] sum (code - zero) * weight code, changed in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from modiff.config import ModulationConfig
from modiff.core.quantizer import Quantizer
from modiff.core.recursion import Message, State, accumulate
from modiff.kernels.encode import encode_input
from modiff.kernels.input_fusion import InputFusion, Norm
from modiff.kernels.kernel import Kernel, largest_weight_code
from modiff.kernels.problem import Problem
from modiff.nn.byte_code import ByteCode, fronts_of, innermost
from modiff.nn.source import version_of
from modiff.nn.stream import Stream
from modiff.nn.weight import Part

if TYPE_CHECKING:
    from modiff.nn.layer import ModulatedLayer


def unsupported(layer: ModulatedLayer) -> str:
    """Why a layer cannot run on integers and is simulated; empty if it can."""
    config, quantizer = layer.config, layer.quantizer
    if config.weight.bits is None:
        return "its weight keeps floats"
    if quantizer is None or quantizer.bits == 0:
        return "its input is not coded" if quantizer is None else "0 bits send nothing that could be summed"
    if not quantizer.config.symmetric:
        return "codes with a zero point of their own have no kernel"
    if quantizer.granularity == "input_channel":
        return "a scale along the summed axis has no integer sums"
    sliding, (_, _, kernel_size) = layer.sliding(), layer._geometry()
    if sliding.unsupported:
        return sliding.unsupported
    if quantizer.granularity == "token" and layer.channel_dim == 1 and {*kernel_size, *sliding.stride} != {1}:
        return "a scale for each pixel has no integer sums over several pixels"
    if config.modulation is not None and config.modulation.error_compensation == "none":
        return "the ablation without error compensation is for study"
    if config.modulation is not None and config.modulation.state_dtype == "float64":
        return "its states are kept in float64, kernels add up float32"
    return ""


class Sliding(NamedTuple):
    """How the kernel of a convolution moves; all empty for a linear layer. unsupported: why no integer kernel
    knows it."""

    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    unsupported: str = ""


class IntegerSide:
    """The kernels of one layer, one for each segment of its input channels, built at first use and kept."""

    def __init__(self, layer: ModulatedLayer) -> None:
        self.layer = layer
        self._floats: tuple[Part, ...] = ()
        self._source: tuple[object, ...] = ()
        self._parts: tuple[tuple[Tensor, Tensor], ...] = ()
        self._kernels: tuple[Kernel, ...] = ()

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """Those of the present weight. Cost: building them waits for the device once."""
        weight, floats = self.layer.weight, self._of_floats()
        source = (weight.data_ptr(), version_of(weight), weight.device)
        if floats is not self._floats or source != self._source:
            parts = self._codes()
            if not _equal(parts, self._parts):  # else what a backend made of the old ones stays
                self._kernels = tuple(self._kernel(*part) for part in parts)
                self._parts = parts
            self._floats, self._source = floats, source
        return self._kernels

    def fuses(self, norm: Norm) -> bool:
        """Whether what stands before the layer can be computed while its input is coded."""
        config, quantizer = self.layer.config, self.layer.quantizer
        if quantizer is None or self.layer.segments is not None or self.layer.weight.device.type != "cpu":
            return False
        if len(quantizer.segments) > 1 and norm != "group":
            return False
        return config.modulation is None or config.modulation.state_dtype in ("float32", "int16")

    def plain(self, x: Tensor, quantizer: Quantizer, dtype: torch.dtype, before: InputFusion | None = None) -> Tensor:
        """A(code(x)) + bias in `dtype`, without memory. Raises: CalibrationError as the quantizer does.

        Args:
            before: what x passes through before it is coded, of its shape.
        """
        given, kernels = quantizer.scales(x), self.kernels
        fronts = fronts_of(x, before, quantizer.segments, quantizer.channel_dim)
        total: Tensor | None = None
        for i, ((part, front), kernel) in enumerate(zip(fronts, kernels, strict=True)):
            arguments = (
                None if given is None else given[i],
                quantizer.bits,
                quantizer.config.clip,
                quantizer.granularity,
            )
            if front is None:
                codes, scale = encode_input(part, *arguments, channel_dim=quantizer.channel_dim)
            else:
                codes, scale = front.encode(part, None, *arguments, channel_dim=quantizer.channel_dim)
            if total is None:
                total = kernel.compute(codes, scale, self.layer.bias, dtype if len(kernels) == 1 else torch.float32)
            else:
                kernel.accumulate(total, codes, scale)
        return torch.as_tensor(total).to(dtype)

    def receive(
        self, message: Message, state: State | None, stream: Stream, dtype: torch.dtype
    ) -> tuple[State, Tensor]:
        """The next output state, and a copy of it in `dtype`."""
        code = message.codes[0] if message.codes else None
        if isinstance(code, ByteCode) and state is not None:
            return self.step(code, state, message.gain, dtype)
        found = self.accumulated(message, state)
        return found, found.value.to(dtype, copy=True)

    def accumulated(self, message: Message, state: State | None) -> State:
        """The next output state as the simulation has it, in the layout that kernels add into."""
        layer = self.layer
        found = accumulate(message, state, layer, layer.config.modulation or ModulationConfig())
        return State(self._place("value", found.value), None if found.move is None else self._place("move", found.move))

    def _place(self, name: str, value: Tensor) -> Tensor:
        """In the layout of the kernels, and where this state was in the last trajectory if this one has buffers."""
        value = value if self.layer.channel_dim == -1 else innermost(value)
        return self.layer.clock.place((self.layer.number, self.layer.calls, name), value)

    def step(
        self, code: ByteCode, state: State, gain: Tensor | float | None, dtype: torch.dtype
    ) -> tuple[State, Tensor]:
        """ô_t = ô_{t+1} [+ g (ô_{t+1} - ô_{t+2})] + A(q_t) in place.

        Returns: the state, and a copy of it in `dtype`.
        """
        sent = list(zip(self.kernels, code.parts, strict=True))
        if self.layer.config.modulation is not None and self.layer.config.modulation.predictor == "linear":
            return self._step_with_move(sent, state, 0.0 if gain is None else gain, dtype)
        for kernel, (codes, scale) in sent[:-1]:
            kernel.accumulate(state.value, codes, scale)
        kernel, (codes, scale) = sent[-1]
        return state, kernel.step(state.value, codes, scale, dtype)

    def _step_with_move(
        self, sent: list[tuple[Kernel, tuple[Tensor, Tensor]]], state: State, gain: Tensor | float, dtype: torch.dtype
    ) -> tuple[State, Tensor]:
        """The move takes what is sent, ô_t - ô_{t+1} = g (ô_{t+1} - ô_{t+2}) + A(q_t), and the state takes the move."""
        move = state.move
        move = self._place("move", torch.zeros_like(state.value)) if move is None else move.mul_(gain)
        for kernel, (codes, scale) in sent:
            kernel.accumulate(move, codes, scale)
        state.value.add_(move)
        return State(state.value, move), state.value.to(dtype, copy=True)

    def _of_floats(self) -> tuple[Part, ...]:
        """The codes of a weight that has its floats, made anew whenever it changed; nothing where it is packed."""
        return () if self.layer.packed else self.layer.quantized_weight.codes(self.layer.weight)

    def _codes(self) -> tuple[tuple[Tensor, Tensor], ...]:
        layer = self.layer
        if layer.packed and len(layer.quantized_weight.segments) == 1:
            return (layer.packed_tensors(),)  # as they are kept: two 4-bit codes in a byte
        return tuple((codes.contiguous(), q.scale) for codes, q in layer.quantized_weight.codes(layer.weight))

    def _kernel(self, codes: Tensor, scale: Tensor) -> Kernel:
        layer, sliding = self.layer, self.layer.sliding()
        channels, groups, kernel_size = layer._geometry()
        inputs = channels if len(layer.quantized_weight.segments) == 1 else codes.shape[1]
        problem = Problem(
            inputs=inputs, outputs=codes.shape[0], kernel_size=kernel_size, stride=sliding.stride,
            padding=sliding.padding, dilation=sliding.dilation, groups=groups, bits=layer.config.activation.bits or 8,
            weight_max=largest_weight_code(codes), device=codes.device.type,
        )  # fmt: skip
        return Kernel(problem, codes, scale.to(torch.float32))


def _equal(parts: tuple[tuple[Tensor, Tensor], ...], others: tuple[tuple[Tensor, Tensor], ...]) -> bool:
    pairs = zip(parts, others, strict=False)
    return len(parts) == len(others) and all(
        (c.device, c.dtype) == (d.device, d.dtype) and torch.equal(c, d) and torch.equal(s, t)
        for (c, s), (d, t) in pairs
    )
