"""What all modulated layers share: they own the states of each context and call the recursion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from modiff.config import Granularity, LayerConfig, ModulationConfig
from modiff.core.hadamard import rotate, segments_of
from modiff.core.quantizer import Coded, Quantizer
from modiff.core.recursion import State, accumulate, encode_plain, output_of
from modiff.errors import ConfigError, StateError
from modiff.kernels.fixed_point import FixedState
from modiff.kernels.input_fusion import InputFusion
from modiff.nn import traced
from modiff.nn.clock import Clock
from modiff.nn.fixed_side import FixedSide
from modiff.nn.fixed_stream import FixedStream
from modiff.nn.integer import IntegerSide, Sliding, unsupported
from modiff.nn.integer_stream import IntegerStream
from modiff.nn.packed import SCALE, PackedWeight, pack_parts, storage
from modiff.nn.stream import Inputs, Key, Stream
from modiff.nn.weight import QuantizedWeight


class LayerState(NamedTuple):
    """Both states of a layer in one context: input = â_t, output = ô_t = A_q(â_t) + (A - A_q)(a_anchor) + bias."""

    input: Tensor
    output: Tensor


class _Calls:
    """How often the layer was called before in the evaluation `tick`; apart, as writing to a module takes 3 us."""

    __slots__ = ("count", "tick")

    def __init__(self) -> None:
        self.count, self.tick = 0, -1


class ModulatedLayer(nn.Module):
    """Mixin before a torch layer: codes its input with memory, ô_t = ô_{t+1} + A(code(a_t - â_{t+1})) (MoDiff, Eq. 14).

    Built by `from_float`, which shares parameters, buffers and hooks with the layer it replaces; the states are plain
    attributes, never saved and never moved by `.to()`.
    """

    channel_dim: ClassVar[int]
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def from_float(
        cls,
        layer: nn.Module,
        config: LayerConfig,
        *,
        name: str = "layer",
        clock: Clock | None = None,
        split: int | None = None,
    ) -> Self:
        """A modulated quantized of a torch layer.

        Args:
            layer: the torch layer; it is not changed.
            name: for messages.
            clock: of the model the layer sits in; its own when None.
            split: channel index where the input is cut into two halves with a quantizer each.
        Raises: ConfigError if the split lies outside the channels or the layer has groups.
        """
        quantized = cls.__new__(cls)
        quantized.__dict__ = dict(
            layer.__dict__
        )  # the same parameters, buffers and hooks: remove() has nothing to copy
        quantized._adopt(config, name, clock or Clock(name), split)
        return quantized

    def _adopt(self, config: LayerConfig, name: str, clock: Clock, split: int | None) -> None:
        channels, groups, _ = self._geometry()
        if split is not None and (not 0 < split < channels or groups > 1):
            raise ConfigError(
                f"{name}: expected a split between 0 and {channels} of a layer without groups, got {split} with "
                f"{groups} groups. The cut must leave channels on both sides. Use split=None."
            )
        runs = (channels,) if split is None else (split, channels - split)
        self.config, self.name, self.clock, self.split = config, name, clock, split
        self.granularity = self._granularity(config.activation.granularity)
        self.segments = segments_of(runs, groups, config.rotation_block) if config.rotation == "hadamard" else None
        fan_in = channels // groups
        folded = None
        if self.segments is not None:
            folded = self.segments if split is not None else segments_of((fan_in,), 1, self.segments[0].block)
        segments = runs if split is not None else (fan_in,)
        self.quantized_weight: QuantizedWeight | PackedWeight
        self.quantized_weight = QuantizedWeight(config.weight, segments, folded, f"{name}.weight")
        self.quantizer = None
        if config.activation.bits is not None:
            moment = clock.moment if config.modulation is None else clock.transition
            self.quantizer = Quantizer(config.activation, self.granularity, self.channel_dim, runs, moment)
        self.integer: IntegerSide | None = None
        if config.execution == "integer" and not unsupported(self):
            fixed = config.modulation is not None and config.modulation.state_dtype == "int16"
            self.integer = FixedSide(self) if fixed else IntegerSide(self)
        self.inputs: Inputs | None = None
        if self.quantizer is not None and config.modulation is not None:
            kinds: dict[type | None, type[Stream]] = {IntegerSide: IntegerStream, FixedSide: FixedStream}
            kind = kinds.get(type(self.integer), Stream)
            self.inputs = Inputs(self.quantizer, config.modulation, clock, kind)
        self.streams: dict[Key, Stream] = {}
        self.outputs: dict[Key, State | FixedState] = {}
        self._seen: dict[Key, int] = {}
        self._calls, self.alone = _Calls(), True
        self.number = traced.number_for(self)
        clock.on_reset(self.forget)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As torch; a copy has a number of its own."""
        super().__setstate__(state)
        self.number = traced.number_for(self)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Of the weight as it computes, packed or not."""
        weight = self.quantized_weight
        return weight.shape if isinstance(weight, PackedWeight) else tuple(self.weight.shape)

    def _geometry(self) -> tuple[int, int, tuple[int, ...]]:
        """Input channels, groups, kernel size."""
        raise NotImplementedError

    def sliding(self) -> Sliding:
        """How a convolution's kernel moves, nothing for a linear layer."""
        raise NotImplementedError

    def operator(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The torch layer's own computation with a given weight and bias."""
        raise NotImplementedError

    def _granularity(self, asked: Granularity) -> Granularity:
        if asked != "auto":
            return asked
        return "token" if self.channel_dim == -1 else "sample"

    def share_with(self, leader: ModulatedLayer) -> None:
        """Read the same coded residual as `leader` whenever both are given the same tensor."""
        self.inputs, self.quantizer = leader.inputs, leader.quantizer
        if self.inputs is not None:
            self.inputs.shared = True
        self.alone = leader.alone = False

    @property
    def packed(self) -> bool:
        """Whether the weight is integers for good."""
        return isinstance(self.quantized_weight, PackedWeight)

    def pack(self) -> None:
        """Keep the codes of the weight and drop its floats; nothing happens where the weight has no bits, or again.

        Raises: ConfigError for a weight with NaN; StateError if it no longer belongs to its fixed codes.
        """
        if self.config.weight.bits is not None and not self.packed:
            self.hold_packed(*self.packed_tensors())

    def packed_tensors(self) -> tuple[Tensor, Tensor]:
        """The packed weight and its scales, whether the layer is packed or not. For layers with weight bits only."""
        scale = self._buffers.get(SCALE)
        if self.packed and scale is not None:
            return self.weight.detach(), scale
        return pack_parts(self.quantized_weight.codes(self.weight), self.config.weight.bits or 8)

    def packed_storage(self) -> tuple[tuple[torch.dtype, tuple[int, ...]], tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of the packed weight and of its scales. For layers with weight bits only."""
        shape, segments = self.weight_shape, self.quantized_weight.segments
        return storage(self.config.weight.bits or 8, shape), (torch.float32, (shape[0], len(segments)))

    def hold_packed(self, weight: Tensor, scale: Tensor) -> None:
        """Take packed codes and their scales, as `packed_storage` says, in the place of the weight.

        The layer that this one was made from keeps its own parameters.
        """
        self._parameters, self._buffers = dict(self._parameters), dict(self._buffers)
        was, shape = self.quantized_weight, self.weight_shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer(SCALE, scale)
        self.quantized_weight = PackedWeight(was.config, was.segments, was.rotation, was.name, shape, self._buffers)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As torch, but scales stay float32 in `.half()` and `.to(dtype)`: rounded ones would be other weights."""
        scale = self._buffers.get(SCALE)
        super()._apply(fn, recurse)
        moved = self._buffers.get(SCALE)
        if scale is not None and moved is not None and moved.dtype != scale.dtype:
            self._buffers[SCALE] = scale.to(moved.device)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """As torch, but floats are not cast to the integers of a packed weight, nor the other way round."""
        weight = state_dict.get(f"{prefix}weight")
        if isinstance(weight, Tensor) and weight.is_floating_point() != self.weight.is_floating_point():
            error_msgs.append(
                f"{prefix}weight: expected {self.weight.dtype}, got {weight.dtype}. Packed and float weights do not "
                "fit each other. Load it with modiff.load."
            )
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def forget(self) -> None:
        """Free the states of all contexts; the weight is looked at again, as writes through `.data` leave no trace."""
        self.quantized_weight.forget()
        self.streams.clear()
        self.outputs.clear()
        self._seen.clear()
        self._calls.tick = -1

    @property
    def state(self) -> LayerState:
        """Both states of the present context. Raises: StateError before the first step."""
        key = (self.clock.context, 0)
        if key not in self.outputs:
            raise StateError(
                f"{self.name}: expected states, got none. The layer has not run in this trajectory. Run it."
            )
        stream = self.streams[key].state
        held = self.outputs[key]
        output = held.value() if isinstance(held, FixedState) else held.value
        return LayerState(stream.value if stream else output, output)

    def state_tensors(self) -> list[Tensor]:
        """Every tensor that the states keep now, of all contexts; shared ones appear in each sharer."""
        inputs = [t for stream in self.streams.values() for t in stream.tensors()]
        return inputs + [t for side in self.outputs.values() for t in side if t is not None]

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output for `x`, same dtype as `x`; one operator in a graph of torch.compile.

        Raises: StateError outside a trajectory, or if the input does not fit the states.
        """
        if torch.compiler.is_compiling():
            return traced.layer(self.clock.token, x, self.number)
        return self.run(x)

    def run(self, x: Tensor, before: InputFusion | None = None, place: int | None = None) -> Tensor:
        """`forward`, outside of any graph or as an operator of one.

        Args:
            before: what x passes through on its way into the layer, of its shape; the layer computes it too.
            place: None outside of a graph; in it what the layer reads there, as `Source` has it.
        """
        if x.numel() == 0:
            raise StateError(f"{self.name}: expected at least one sample, got an empty batch {tuple(x.shape)}. "
                             "An empty input has no range to quantize. Skip empty batches.")  # fmt: skip
        if not torch.is_autocast_enabled(x.device.type):  # entering the context costs more than a small layer
            return self._coded(x, before, place)
        with torch.autocast(x.device.type, enabled=False):
            return self._coded(x, before, place)

    def _coded(self, x: Tensor, before: InputFusion | None, place: int | None) -> Tensor:
        value = x
        if before is not None and (self.integer is None or not self.integer.fuses(before.norm)):
            value, before = before.compute(x), None
        if self.segments is not None:
            value = rotate(_at_least_float32(value), self.segments, self.channel_dim)
        if self.quantizer is None:
            return self.affine(_at_least_float32(value)).to(x.dtype)
        if self.config.modulation is None or self.inputs is None:
            if self.integer is not None and not self.quantizer.watching:
                return self.integer.plain(value, self.quantizer, x.dtype, before)
            value = value if before is None else before.compute(value)
            return output_of(encode_plain(value, self.quantizer), self).to(x.dtype)
        return self._modulated(x, value, before, place, self.config.modulation, self.inputs)

    def _modulated(
        self,
        x: Tensor,
        value: Tensor,
        before: InputFusion | None,
        place: int | None,
        config: ModulationConfig,
        inputs: Inputs,
    ) -> Tensor:
        key = self._key()
        if key not in self.streams:
            self.streams[key] = inputs.stream_for(x, place)
        stream = self.streams[key]
        message = stream.read(self.name, x, value, before, place)
        seen = self._seen.get(key, 0)
        if stream.count != seen + 1 and not message.starts:
            raise StateError(
                f"{self.name}: expected message {seen + 1} of its group, got message {stream.count}. The layer was "
                "skipped in a step while others read the shared residual. Use ModiffConfig(share_residuals='off')."
            )
        self._seen[key] = stream.count
        held = self.outputs.get(key)
        if self.integer is not None:
            self.outputs[key], output = self.integer.receive(message, held, stream, x.dtype)
        else:
            self.outputs[key] = accumulate(message, held, self, config)
            output = self.outputs[key].value.to(x.dtype, copy=True)
        if self.alone:
            stream.message = None  # nobody else will read it: free the codes now
        return output

    @property
    def calls(self) -> Key:
        """The context, and how many times the layer was called before in this evaluation."""
        return self.clock.context, self._calls.count

    def _key(self) -> Key:
        """A state for each context and for each time the layer is called within one evaluation of the network."""
        clock = self.clock
        if not (clock.active and clock.inside):
            raise StateError(
                f"{self.name}: expected a running trajectory, got a call outside of one. The states of a modulated "
                "layer live for one generation. Call the model inside `with modiff.trajectory(model):`."
            )
        calls = self._calls
        calls.count = calls.count + 1 if calls.tick == clock.tick else 0
        calls.tick = clock.tick
        return self.calls

    def affine(self, value: Tensor) -> Tensor:
        """A_q(value) + bias with the quantized, rotated weight."""
        return self._affine(value, self.quantized_weight.dense(self.weight, value.dtype))

    def anchor(self, value: Tensor) -> Tensor:
        """A(value) + bias where the states start: with the rotated weight before rounding, or A_q by the config."""
        modulation = self.config.modulation
        if modulation is None or modulation.anchor_weights == "quantized":
            return self.affine(value)
        return self._affine(value, self.quantized_weight.exact(self.weight, value.dtype))

    def _affine(self, value: Tensor, weight: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.detach().to(value.dtype)
        return self.operator(value, weight, bias)

    def linear(self, code: Coded) -> Tensor:
        """A_q(code) without bias."""
        value = code.value()
        return self.operator(value, self.quantized_weight.dense(self.weight, value.dtype), None)

    def start(self) -> Tensor | float:
        """The bias, shaped to be added to an output."""
        if self.bias is None:
            return 0.0
        trailing = 0 if self.channel_dim == -1 else len(self._geometry()[2])
        return _at_least_float32(self.bias.detach()).reshape(-1, *[1] * trailing)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
