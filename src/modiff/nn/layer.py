"""The layers that are quantized: they have the parameters of a torch layer, and hand its input to their loop."""

import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from modiff.config import LayerConfig, PackedAnchors
from modiff.core.granularity import resolve
from modiff.core.quantizer import Quantizer
from modiff.errors import StateError
from modiff.kernels.input_fusion import InputFusion
from modiff.nn import traced
from modiff.nn.adapters import copied, torch_class
from modiff.nn.clock import Clock
from modiff.nn.loop.int16 import Int16Loop
from modiff.nn.loop.integer import IntegerLoop, unsupported
from modiff.nn.loop.simulated import InputGroup, SimulatedLoop
from modiff.nn.operator import LayerOperator, LayerSpec, evaluated
from modiff.nn.weight import ERROR, ERROR_SCALE, PACKED, SCALE, PackedWeight, QuantizedWeight, pack_codes, turned


class ModulatedLayer(nn.Module):
    """Mixin before a torch layer, ô_t = ô_{t+1} + A_q(quantize(a_t - â_{t+1})) (MoDiff, Eq. 14).

    Built by `from_float`, which shares parameters, buffers and hooks with the layer it replaces. `loop` holds the
    states, which are never saved and never moved by `.to()`; `unsupported` says why it is not on integers.
    A weight or bias that changes within a trajectory anchors the output state again. Writes through `.data` are seen at
    the next evaluation after it was read; otherwise each compares the bytes of one layer, of all where it changed.
    """

    channel_dim: ClassVar[int] = 1
    spec_of: Callable[[str, LayerConfig, int | None], LayerSpec]

    @functools.wraps(nn.Module.__new__)
    def __new__(cls, *sizes: Any, **settings: Any) -> Any:
        """Built from sizes it is the plain torch layer: PEFT makes a LoRA's matrices of the class that they adapt."""
        if not sizes and not settings:  # from_float, copies
            return super().__new__(cls)
        return torch_class(cls)(*sizes, **settings)

    __deepcopy__ = copied

    @classmethod
    def from_float(
        cls, layer: nn.Module, config: LayerConfig, *, name: str, clock: Clock | None = None, split: int | None = None
    ) -> Self:
        """The quantized layer of a torch layer, which is not changed; on the clock of its model, or one of its own.

        split: channel index where the input is cut into two halves with a quantizer each.
        Raises: ConfigError if the split lies outside the channels or the layer has groups.
        """
        quantized = cls.__new__(cls)
        quantized.__dict__ = dict(layer.__dict__)  # the same parameters, buffers and hooks: remove() copies nothing
        quantized.name, quantized.config = name, config
        spec = quantized.spec = quantized.spec_of(name, config, split)
        if not cls.keeps(layer):  # hooks before it may have made its weight
            quantized.__dict__ |= {"_modules": {}, "_buffers": {}, "_forward_pre_hooks": OrderedDict()}
            quantized._parameters = evaluated(layer, spec) or layer._parameters
        spec.check_channels()
        clock = quantized.clock = clock or Clock(name)
        quantized.operator = LayerOperator(spec, quantized._parameters)
        quantizer = None
        if config.activation.bits is not None:
            moment = clock.moment if config.modulation is None else clock.transition
            granularity = resolve(config.activation.granularity, cls.channel_dim)
            quantizer = Quantizer(config.activation, granularity, cls.channel_dim, spec.runs, moment)
        quantized.unsupported, kind = unsupported(spec, quantizer), SimulatedLoop
        if config.execution == "integer" and not quantized.unsupported:
            kind = Int16Loop if config.state_dtype == "int16" else IntegerLoop
        quantized.loop = kind(spec, quantized.operator, quantizer, clock)
        quantized.number = traced.number_for(quantized)
        return quantized

    @classmethod
    def keeps(cls, layer: nn.Module) -> bool:
        """Whether a layer keeps the weight and the forward of the torch layer that this class takes the place of."""
        own = any(type(layer).forward is base.__dict__.get("forward") for base in cls.__mro__)
        return own and {"weight", "bias"} <= layer._parameters.keys()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As torch; a copy has a number of its own."""
        super().__setstate__(state)
        self.number = traced.number_for(self)

    @property
    def _parameters(self) -> dict[str, nn.Parameter | None]:
        """As torch; who reads them between two evaluations may write them through `.data`."""
        operator = self.__dict__.get("operator")
        if operator is not None and not self.clock.running:
            operator.forget()
        return self.__dict__["_parameters"]

    @_parameters.setter
    def _parameters(self, parameters: dict[str, nn.Parameter | None]) -> None:
        self.__dict__["_parameters"] = parameters

    @property
    def bias(self) -> Tensor | None:
        """The parameter, or what made it."""
        return self._parameter("bias")

    @bias.setter
    def bias(self, made: Tensor) -> None:
        self._make("bias", made)

    @property
    def weight(self) -> Tensor:
        """The float weight, as others read it; of a packed layer what its codes stand for, unpacked at each access."""
        stored, quantized = self._parameter("weight"), self.quantized_weight
        if isinstance(quantized, PackedWeight):
            hook = self.__dict__.get("_hf_hook", self if "_old_forward" in self.__dict__ else None)  # of accelerate
            moving = hook is self or getattr(hook, "offload", False)  # which reads what it moves
            return stored if moving or any(each.is_meta for each in quantized.stored()) else quantized.readable()
        return stored

    @weight.setter
    def weight(self, made: Tensor) -> None:
        self._make("weight", made)

    def __delattr__(self, name: str) -> None:
        """As torch. Raises: StateError for a packed weight."""
        if name == "weight" and self.packed:
            self.quantized_weight.floats(self.weight)
        if name in ("weight", "bias") and name not in {*self._parameters, *self._buffers}:
            self.operator.parameters = self._parameters
        else:
            super().__delattr__(name)

    def _parameter(self, name: str) -> Any:
        if name in (parameters := {**self.operator.parameters, **self._parameters}):
            return parameters[name]
        raise AttributeError(name)

    def _make(self, name: str, made: Tensor) -> None:
        """Take a buffer, or what pruning, a norm or a parametrization makes. Raises: StateError if packed."""
        if self.packed and name == "weight":
            self.quantized_weight.floats(made)
        self.operator.parameters = {**self.operator.parameters, **self._parameters, name: made.detach()}

    def check_own(self, verb: str) -> None:
        """Make sure that the parameters are the layer's own. Raises: StateError for those made at each call."""
        if made := {"weight", "bias"} - self._parameters.keys():
            raise StateError(f"{verb}: expected {self.name}.{min(made)} as a parameter, got one that a hook or "
                             "parametrization makes at each call. Call modiff.remove and modiff.apply.")  # fmt: skip

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """As torch; a weight or bias may become one. Raises: StateError for what would be a packed weight."""
        super().register_buffer(name, tensor, persistent)
        if name in ("weight", "bias") and tensor is not None:
            self._make(name, tensor)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As torch, but a packed weight takes itself. Raises: StateError for what would be one, or make one."""
        if name.startswith("weight") and self.packed and (param is None or param.is_floating_point()):
            return cast(PackedWeight, self.quantized_weight).keep(param if name == "weight" else None)
        self.operator.parameters = self._parameters  # nothing makes it any more
        super().register_parameter(name, param)

    def extra_repr(self) -> str:
        """As the torch layer has it, and the bits."""
        states = f", {self.loop.state_dtype} states" if self.inputs is not None else ""
        return f"{super().extra_repr()}, {self.config.setting}{f' on integers{states}' if self.on_integers else ''}"

    @property
    def on_integers(self) -> bool:
        """Whether the layer computes with integers."""
        return isinstance(self.loop, IntegerLoop)

    @property
    def quantizer(self) -> Quantizer | None:
        """Of the input or its residual; None where it keeps its floats."""
        return self.loop.quantizer

    @property
    def inputs(self) -> InputGroup | None:
        """The input states, which layers that read one tensor share; None without modulation."""
        return self.loop.inputs

    @property
    def quantized_weight(self) -> QuantizedWeight:
        """The codes of the weight."""
        return self.operator.quantized

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Of the weight as it computes, packed or not."""
        quantized = self.quantized_weight
        return getattr(quantized, "shape", tuple(turned(self.operator.weight, quantized.transposed).shape))

    def share_with(self, leader: "ModulatedLayer") -> None:
        """Read the same quantized residual as `leader` whenever both are given the same tensor."""
        self.loop.inputs, self.loop.quantizer = leader.inputs, leader.quantizer
        if leader.inputs is not None:
            leader.inputs.shared = True

    @property
    def packed(self) -> bool:
        """Whether the weight is integers for good."""
        return isinstance(self.quantized_weight, PackedWeight)

    def pack(self, anchor_weights: PackedAnchors = "quantized") -> None:
        """Keep the codes of the weight, for "int8" anchors those of its rounding error too, and drop its floats.

        Nothing happens where the weight has no bits, or again.
        Raises: ConfigError for a weight with NaN; StateError if it no longer belongs to its fixed codes.
        """
        if self.config.weight.bits is not None and not self.packed:
            self.hold_packed(self.packed_state(anchor_weights))

    def packed_state(self, anchor_weights: PackedAnchors = "quantized") -> dict[str, Tensor]:
        """All tensors of the packed weight, by their names in `PACKED`. Raises: StateError if its scales were lost."""
        stored = self.operator.weight
        if self.packed:
            names = PACKED[1:] if self.keeps_error() else (SCALE,)
            quantized: Any = self.quantized_weight
            return {"weight": stored.detach()} | {name: quantized.buffer(name) for name in names}
        tensors = pack_codes(self.quantized_weight.codes(stored), self.config.weight.bits or 8)
        if self.keeps_error(anchor_weights):
            tensors += pack_codes(self.quantized_weight.error(stored), 8)
        return dict(zip(PACKED, tensors, strict=False))

    def keeps_error(self, anchor_weights: PackedAnchors = "quantized") -> bool:
        """Whether the layer keeps codes of its weight's rounding error, or `pack(anchor_weights)` would make them."""
        if self.packed:
            return self._buffers.get(ERROR) is not None
        return anchor_weights == "int8" and self.spec.anchors_exactly and self.config.weight.bits is not None

    @property
    def anchors_with(self) -> str:
        """What the input meets where the states start, in words; empty for a layer without states."""
        if self.inputs is None:
            return ""
        bits, until = self.config.weight.bits, " until it is nearer to zero" * self.spec.watches_anchor
        if bits is None or (self.spec.anchors_exactly and not self.packed):
            return f"exact weights{until}"
        if self.keeps_error():
            return f"int8 anchor codes ({1.5 if bits <= 4 else 2} bytes a weight){until}"
        return "quantized weights"

    def hold_packed(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the tensors of a packed weight, as `packed_storage` has them; the replaced layer keeps its weight."""
        weight, shape = nn.Parameter(tensors["weight"], requires_grad=False), self.weight_shape
        dtype = getattr(self.quantized_weight, "dtype", self.operator.weight.dtype)
        self._parameters = self.operator.parameters = {**self._parameters, "weight": weight}
        self._buffers = {**self._buffers, **{name: each for name, each in tensors.items() if name != "weight"}}
        self.operator.quantized = PackedWeight(self.quantized_weight, shape, dtype, self._parameters, self._buffers)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As torch, but scales stay float32 in `.half()` and `.to(dtype)`: rounded ones would be other weights."""
        scales = {name: self._buffers[name] for name in (SCALE, ERROR_SCALE) if self._buffers.get(name) is not None}
        super()._apply(fn, recurse)
        if isinstance(packed := self.quantized_weight, PackedWeight):
            packed.dtype = fn(torch.empty(0, dtype=packed.dtype)).dtype
        for name, scale in scales.items():
            if self._buffers[name].dtype != scale.dtype:
                self._buffers[name] = scale.to(self._buffers[name].device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """As torch, but floats are not cast to the integers of a packed weight, nor the other way round."""
        weight, dtype = state_dict.get(f"{prefix}weight"), self.operator.weight.dtype
        if not isinstance(weight, Tensor) or weight.is_floating_point() == dtype.is_floating_point:
            super()._load_from_state_dict(state_dict, prefix, *others)
            return
        others[-1].append(f"{prefix}weight: expected {dtype}, got {weight.dtype}. One is packed. Use modiff.load.")

    def forward(self, input: Tensor) -> Tensor:
        """The layer's output for `input`, same dtype; one operator in a graph of torch.compile.

        A gradient for `input` is refused when it is asked for: its backward raises StateError.
        Raises: StateError outside a trajectory, or if the input does not fit the states.
        """
        graph = torch.compiler.is_compiling()
        output = traced.layer(self.clock.token, input, self.number) if graph else self.run(input)
        if input.requires_grad and torch.is_grad_enabled() and not output.requires_grad:
            return traced.guard(input, output, self.number)
        return output

    def run(self, x: Tensor, fusion: InputFusion | None = None, read: int | None = None) -> Tensor:
        """`forward`, outside of any graph or as an operator of one; with what x passes through on its way in."""
        spec = self.spec
        if made := self._modules.get("parametrizations"):  # by torch, since it was modulated
            for name in cast(nn.ModuleDict, made):
                self._make(name, getattr(self, name))
        for name in {"weight", "bias"} & self._buffers.keys():
            self._make(name, cast(Tensor, self._buffers[name]))
        axes = len(spec.kernel_size) + 2 if spec.kernel_size else x.dim()
        if x.dim() == axes - 1:  # a sample without the axis of its batch
            return self.run(x[None], fusion, read)[0]
        if x.numel() == 0 or x.dim() != axes:  # an expert that nothing was sent to; what torch refuses
            return self.operator.affine(x)
        if not torch.is_autocast_enabled(x.device.type):  # entering the context costs more than a small layer
            return self.loop.step(x, fusion, read)
        with torch.autocast(x.device.type, enabled=False):
            return self.loop.step(x, fusion, read)


class ModulatedLinear(ModulatedLayer, nn.Linear):
    """`nn.Linear` on codes of residuals, ô_t = ô_{t+1} + W q_t: (*, in_features) -> (*, out_features)."""

    channel_dim: ClassVar[int] = -1

    def spec_of(self, name: str, config: LayerConfig, split: int | None) -> LayerSpec:
        """Geometry, config and name."""
        return LayerSpec(name, config, self.in_features, -1, functional.linear, split)


class _ModulatedConv(ModulatedLayer):
    def spec_of(self: Any, name: str, config: LayerConfig, split: int | None) -> LayerSpec:
        """Geometry, with padding resolved, config and name."""
        pads = self._reversed_padding_repeated_twice  # (left, right) of each axis, the last axis first
        left, right = pads[0::2][::-1], pads[1::2][::-1]
        unsupported = "" if left == right else "no kernel pads one side more than the other"
        operate = functools.partial(
            getattr(functional, f"conv{len(self.kernel_size)}d"), stride=self.stride, padding=self.padding,
            dilation=self.dilation, groups=self.groups,
        )  # fmt: skip
        if self.padding_mode != "zeros":
            operate, unsupported = self._conv_forward, f"no kernel pads with {self.padding_mode!r}"
        return LayerSpec(
            name, config, self.in_channels, 1, operate, split, self.groups, self.kernel_size,
            self.stride, tuple(left), self.dilation, unsupported,
        )  # fmt: skip


class ModulatedConv1d(_ModulatedConv, nn.Conv1d):
    """`nn.Conv1d` on codes of residuals, ô_t = ô_{t+1} + W * q_t: (N, C, L) -> (N, O, L')."""


class ModulatedConv2d(_ModulatedConv, nn.Conv2d):
    """`nn.Conv2d` on codes of residuals, ô_t = ô_{t+1} + W * q_t: (N, C, H, W) -> (N, O, H', W')."""


class ModulatedConv3d(_ModulatedConv, nn.Conv3d):
    """`nn.Conv3d` on codes of residuals, ô_t = ô_{t+1} + W * q_t: (N, C, D, H, W) -> (N, O, D', H', W')."""


class _ModulatedTransposed(ModulatedLayer):
    def spec_of(self: Any, name: str, config: LayerConfig, split: int | None) -> LayerSpec:
        """Geometry, config and name."""
        operate = functools.partial(_ModulatedTransposed.operate, self)
        return LayerSpec(
            name, config, self.in_channels, 1, operate, split, self.groups, self.kernel_size, self.stride, self.padding,
            self.dilation, "no kernel is a transposed convolution", self.groups,
        )  # fmt: skip

    def operate(self: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's own computation with a weight (O, I / groups, ...)."""
        axes, size = len(self.kernel_size), self.__dict__.get("output_size")
        extra = self._output_padding(x, size, self.stride, self.padding, self.kernel_size, axes, self.dilation)
        convolve, weight = getattr(functional, f"conv_transpose{axes}d"), turned(weight, self.groups)
        return convolve(x, weight, bias, self.stride, self.padding, extra, self.groups, self.dilation)

    def forward(self: Any, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """As `ModulatedLayer.forward`. Raises: StateError also for an output size in a graph."""
        if not torch.compiler.is_compiling():
            self.__dict__["output_size"] = output_size
        elif output_size is not None:
            raise StateError(f"{self.name}: expected no output size in a graph of torch.compile, got {output_size}. "
                             "The graph keeps none. Set the layer's output_padding.")  # fmt: skip
        return super().forward(input)


class ModulatedConvTranspose1d(_ModulatedTransposed, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` on codes of residuals: (N, C, L) -> (N, O, L')."""


class ModulatedConvTranspose2d(_ModulatedTransposed, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` on codes of residuals: (N, C, H, W) -> (N, O, H', W')."""


class ModulatedConvTranspose3d(_ModulatedTransposed, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` on codes of residuals: (N, C, D, H, W) -> (N, O, D', H', W')."""


QUANTIZED_CLASSES: dict[type[nn.Module], type[ModulatedLayer]] = {
    nn.Linear: ModulatedLinear,
    nn.Conv1d: ModulatedConv1d,
    nn.Conv2d: ModulatedConv2d,
    nn.Conv3d: ModulatedConv3d,
    nn.ConvTranspose1d: ModulatedConvTranspose1d,
    nn.ConvTranspose2d: ModulatedConvTranspose2d,
    nn.ConvTranspose3d: ModulatedConvTranspose3d,
}
"""A new layer class enters here, with `spec_of` in its class."""


def quantized_class(layer: nn.Module) -> type[ModulatedLayer] | None:
    """The modulated class of the torch layer whose computation a layer's forward is, whatever makes its weight."""
    kinds = {} if isinstance(layer, ModulatedLayer) else QUANTIZED_CLASSES
    classes = [quantized for kind, quantized in kinds.items() if isinstance(layer, kind)]
    made = (each for each in classes if evaluated(layer, each.spec_of(layer, "layer", LayerConfig(), None)))
    return next((each for each in classes if each.keeps(layer)), None) or next(made, None)
