"""A layer's geometry, config and name, and its affine map with the quantized weight."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from modiff.config import LayerConfig
from modiff.core.hadamard import RotatedRun, rotate, rotated_runs
from modiff.core.quantizer import Code
from modiff.errors import ConfigError
from modiff.kernels.input_fusion import InputFusion, Norm
from modiff.nn.weight import QuantizedWeight, at_least_float32, turned, version_of


@dataclass(frozen=True)
class LayerSpec:
    """A layer's geometry, config and name.

    channels: of the input. channel_dim: their axis in input and output, -1 or 1.
    operate: the torch layer's own computation, (x, weight, bias) -> output.
    split: channel index where the input is cut into two runs with a quantizer each.
    kernel_size, stride, padding, dilation: of a convolution; empty for a linear layer.
    unsupported: why no integer kernel moves over the input as this layer does.
    transposed: groups where the parameter is (I, O / groups, ...), else 0. `operate` takes (O, I / groups, ...).
    """

    name: str
    config: LayerConfig
    channels: int
    channel_dim: int
    operate: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    split: int | None = None
    groups: int = 1
    kernel_size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    unsupported: str = ""
    transposed: int = 0

    def check_channels(self) -> None:
        """Raises: ConfigError for a split, smoothing or large channels that are not of this layer, or for groups."""
        config, channels, split = self.config, self.channels, self.split
        large = config.large_channels
        for applies, fits, expected, got, instead in (
            (split is not None, 0 < (split or 0) < channels, f"a split between 0 and {channels}", split, "split=None"),
            (config.smoothing, len(config.smoothing) == channels, f"smoothing of {channels} channels",
             f"{len(config.smoothing)} factors", "smoothing=()"),
            (large, max(large, default=0) < channels > len(large), f"some of {channels} channels as large ones", large,
             "large_channels=()"),
        ):  # fmt: skip
            if applies and (not fits or self.groups > 1):
                raise ConfigError(
                    f"{self.name}: expected {expected} of a layer without groups, got {got} with {self.groups} groups. "
                    f"Each channel has one quantizer and one factor. Use {instead}."
                )

    @cached_property
    def runs(self) -> tuple[int, ...]:
        """How many channels of the input each quantizer has; those of the large ones come last."""
        large, split = self.config.large_channels, self.split or 0
        halves = (split - sum(c < split for c in large), self.channels - split - sum(c >= split for c in large))
        return tuple(count for count in (*halves, len(large)) if count)

    @cached_property
    def order(self) -> Tensor | None:
        """The channels in the order of `runs`; None where they lie so."""
        if not (large := self.config.large_channels):
            return None
        return torch.tensor([*(c for c in range(self.channels) if c not in large), *large])

    @cached_property
    def rotation(self) -> tuple[RotatedRun, ...] | None:
        """Blocks in which the input is rotated, None where it is not."""
        if self.config.rotation == "none":
            return None
        return rotated_runs(self.runs, self.groups, self.config.rotation_block)

    @cached_property
    def smoothing(self) -> Tensor | None:
        """What divides the channels of the input, (C, 1, ...) or (C,); None where nothing does."""
        if not self.config.smoothing:
            return None
        return torch.tensor(self.config.smoothing).reshape(-1, *[1] * len(self.kernel_size))

    @cached_property
    def encodes_as_it_comes(self) -> bool:
        """Whether the input is neither smoothed nor ordered nor rotated."""
        return self.rotation is self.smoothing is self.order is None

    @cached_property
    def anchors_exactly(self) -> bool:
        """Whether the config asks for the weight before rounding where the states start."""
        modulation = self.config.modulation
        if modulation is None or modulation.first_step == "coded" or self.config.activation.bits is None:
            return False
        return modulation.anchor_weights == "exact"

    @cached_property
    def watches_anchor(self) -> bool:
        """Whether it is looked at how far an input is from where it started: the weight has fewer bits than codes."""
        activation = self.config.activation
        return self.anchors_exactly and activation.dynamic and (self.config.weight.bits or 8) < (activation.bits or 0)

    def fuses(self, norm: Norm, device: torch.device) -> bool:
        """Whether kernels compute a norm or an activation in front of the layer while its result is encoded."""
        if not self.encodes_as_it_comes or device.type != "cpu" or (self.split is not None and norm != "group"):
            return False
        return self._fuses_states

    @cached_property
    def _fuses_states(self) -> bool:
        return self.config.modulation is None or self.config.state_dtype in ("float32", "int16")

    def prepared(self, x: Tensor, fusion: InputFusion | None) -> Tensor:
        """The tensor that is encoded: x, or what `fusion` makes of it, smoothed, ordered, rotated as the layer does."""
        value = x if fusion is None else fusion.compute(x)
        if self.smoothing is not None:
            value = at_least_float32(value) / self.smoothing.to(value.device)
        if self.order is not None:
            value = value.index_select(self.channel_dim, self.order.to(value.device))
        return value if self.rotation is None else rotate(at_least_float32(value), self.rotation, self.channel_dim)


class LayerOperator:
    """A(x) + b of one layer, with its quantized weight or the weight before rounding.

    parameters: the layer's own dictionary; `weight` and `bias` are read at each use, as they may be replaced and moved.
    bias_key: address and version of the bias when its values were last compared. bias_edition: how often they changed.
    """

    def __init__(self, spec: LayerSpec, parameters: dict[str, Any]) -> None:
        self.spec, self.parameters = spec, parameters
        columns, rotation = spec.runs, spec.rotation
        if len(columns) == 1:
            columns = (spec.channels // spec.groups,)
            rotation = None if rotation is None else rotated_runs(columns, 1, rotation[0].block)
        self.quantized = QuantizedWeight(
            spec.config.weight, columns, rotation, f"{spec.name}.weight", spec.transposed, spec.smoothing, spec.order
        )
        self._bias: Tensor | None = None
        self._noise: tuple[int, float] | None = None
        self.bias_key: object = ()
        self.bias_edition = 0

    @property
    def weight(self) -> Tensor:
        """The parameter: floats, or packed codes."""
        return self.parameters["weight"]

    @property
    def bias(self) -> Tensor | None:
        """The parameter."""
        return self.parameters["bias"]

    def compare_bias(self, key: object) -> None:
        """Count an edition of the bias if its values are others than before."""
        before, self.bias_key = self._bias, key
        self._bias = bias = None if self.bias is None else self.bias.detach().clone()
        same = before is bias or (before is not None and bias is not None and torch.equal(before.to(bias.device), bias))
        self.bias_edition += not same

    def look(self) -> bool:
        """Whether the values changed, if they were compared before and lie on the CPU: others would be waited for."""
        weight, bias = self.parameters.get("weight"), self.parameters.get("bias")
        if weight is None or not weight.is_cpu or not self.quantized.known or any(map(_only_stored, (weight, bias))):
            return False
        before = self.bias_edition + self.quantized.edition
        self.quantized.forget()
        self.compare_bias(None if bias is None else (bias.data_ptr(), version_of(bias)))
        return self.bias_edition + self.quantized.refresh(weight) != before

    def forget(self) -> None:
        """Look at the values at the next use, as writes through `.data` leave no trace."""
        self.bias_key = ()
        self.quantized.forget()

    def affine(self, value: Tensor) -> Tensor:
        """A_q(value) + bias with the quantized, rotated weight."""
        return self._affine(value, self.quantized.dense)

    def anchor(self, value: Tensor) -> Tensor:
        """A(value) + bias where the states start: with the rotated weight before rounding, or A_q by the config."""
        return self._affine(value, self.quantized.exact if self.spec.anchors_exactly else self.quantized.dense)

    def weight_noise(self) -> float:
        """Mean square of what rounding took from the weight, over that of the weight; 0 where it is gone.

        Cost: once for each edition of the weight a pass over it.
        """
        edition = self.quantized.refresh(self.weight)
        if self._noise is not None and self._noise[0] == edition:
            return self._noise[1]
        exact = self.quantized.exact(self.weight, torch.float32)
        lost = exact - self.quantized.dense(self.weight, torch.float32)
        noise = float(lost.square().sum() / exact.square().sum().clamp_min(torch.finfo(torch.float32).tiny))
        self._noise = edition, noise
        return noise

    def linear(self, code: Code) -> Tensor:
        """A_q(code) without bias."""
        value = code.value()
        return self.spec.operate(value, self.quantized.dense(self.parameters["weight"], value.dtype), None)

    def start(self) -> Tensor | float:
        """The bias, shaped to be added to an output."""
        if (bias := self.bias) is None:
            return 0.0
        return at_least_float32(bias.detach()).reshape(-1, *[1] * len(self.spec.kernel_size))

    def _affine(self, value: Tensor, weight_of: Callable[[Tensor, torch.dtype], Tensor]) -> Tensor:
        bias = None if self.bias is None else self.bias.detach().to(value.dtype)
        return self.spec.operate(value, weight_of(self.weight, value.dtype), bias)


class _Operands(TorchFunctionMode):
    """Keeps what every linear map and convolution is given, and what comes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **kwargs or {})
        if getattr(func, "__name__", "").startswith(("linear", "conv")):
            names = zip(("input", "weight", "bias"), args, strict=False)
            self.seen.append({"bias": None, **dict(names), **(kwargs or {}), "output": output})
        return output


def evaluated(layer: nn.Module, spec: LayerSpec) -> dict[str, nn.Parameter | None]:
    """Weight and bias that a layer computes with: its parametrization, hooks and standardization, evaluated once.

    Empty where it returns anything else than `spec.operate` of its input with them. Cost: two calls of the layer.
    """
    like, training, operands = next(layer.parameters(), torch.empty(0)), layer.training, _Operands()
    geometry = zip(spec.kernel_size, spec.padding, spec.dilation, strict=True)
    shape = (2, spec.channels, *(2 + padding + dilation * size for size, padding, dilation in geometry))
    x = torch.arange(math.prod(shape), device=like.device).sin().to(like.dtype).reshape(shape)
    try:
        with torch.no_grad(), operands:
            outputs = layer.eval()(x), layer(-2 * x)
        (one, other), of_torch = operands.seen, type(layer).forward.__module__.startswith("torch.nn.")
        passed = one["output"] is outputs[0] and (of_torch or one["input"] is x)  # torch's own forward may pad before
        ours = spec.operate(x, turned(one["weight"], spec.transposed), one["bias"])
        fits = passed and torch.equal(one["weight"], other["weight"]) and torch.allclose(ours, outputs[0], 1e-3, 1e-5)
    except (TypeError, ValueError, RuntimeError):
        return {}  # it reads, computes or returns something else
    finally:
        layer.train(training)
    values = [(name, one[name]) for name in ("weight", "bias") if fits]
    return {name: None if v is None else nn.Parameter(v.detach(), requires_grad=False) for name, v in values}


def _only_stored(tensor: Tensor | None) -> bool:
    """Whether it is kept in 8-bit floats and computed with in others, which come as another tensor."""
    return tensor is not None and tensor.is_floating_point() and tensor.element_size() == 1
