"""The settings of modiff as frozen dataclasses: validated once, hashable, JSON in and out."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal, Self

from modiff.errors import ConfigError

VERSION = "0.1.0"
"""Of modiff, written into checkpoints; `modiff.__version__`."""
PackedAnchors = Literal["quantized", "int8"]
StateDtype = Literal["auto", "float32", "float64", "float16", "bfloat16", "int16"]
Rotation = Literal["none", "hadamard"]
Automatic = Literal["auto", "off"]
WeightSearch = Literal["minmax", "mse"]

GRANULARITIES = ["auto", "tensor", "sample", "token", "input_channel"]
"""The names that `QuantizerConfig.granularity` may have; `register_granularity` adds to them."""
PREDICTORS = ["hold", "linear"]
"""The names that `ModulationConfig.predictor` may have; `register_predictor` adds to them."""


def check(where: str, value: object, valid: bool, expected: str, hint: str) -> None:
    """Raise the one-line ConfigError of a bad field; `hint` says why and what to type instead."""
    if not valid:
        raise ConfigError(f"{where}: expected {expected}, got {value!r}. {hint}")


def check_count(where: str, value: Any, hint: str) -> None:
    """Raise the ConfigError of what is no whole number from 1 on."""
    whole = hasattr(value, "__index__")
    check(where, value, whole and value >= 1, "1 or more" if whole else "a whole number", hint)


def is_bits(value: object, lowest: tuple[int, ...] = ()) -> bool:
    """True for None (off), for 2 to 8, and for the values in `lowest`."""
    return value is None or (type(value) is int and (2 <= value <= 8 or value in lowest))


class JsonConfig:
    """Dictionaries and JSON for frozen dataclasses; unknown fields are errors, nested configs are rebuilt."""

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(type(self)).items():
            value = getattr(self, name)
            check(f"{type(self).__name__}.{name}", value, _fits(hint, value), _expected(hint), "Give one of that kind.")

    def check(self, name: str, valid: bool, expected: str, hint: str) -> None:
        """Raise the ConfigError of a field, or of one inside of a field's config."""
        check(f"{type(self).__name__}.{name}", attrgetter(name)(self), valid, expected, hint)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and scalars; the inverse of `from_dict`."""
        return json.loads(json.dumps(dataclasses.asdict(typing.cast(Any, self))))

    def to_json(self) -> str:
        """Indented JSON; the inverse of `from_json`."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Rebuild a config. Raises ConfigError on a field that this class does not have."""
        hints = typing.get_type_hints(cls)
        check(cls.__name__, values, isinstance(values, dict), "an object with named fields", "Write it as {}.")
        for name in values:
            check(cls.__name__, name, name in hints, "a known field", f"Known fields: {', '.join(hints)}.")
        return cls(**{name: _revive(hints[name], value) for name, value in values.items()})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Rebuild a config from JSON text. Raises ConfigError when the text is not JSON."""
        try:
            values = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ConfigError(f"{cls.__name__}: expected JSON, got {error}. Compare it with to_json().") from None
        return cls.from_dict(values)


def _revive(hint: Any, value: Any) -> Any:
    """JSON value -> the type the annotation names: nested configs, optional ones, tuples from lists."""
    if isinstance(hint, types.UnionType):
        options = [t for t in typing.get_args(hint) if t is not type(None)]
        return None if value is None else _revive(options[0], value)
    if isinstance(hint, type) and issubclass(hint, JsonConfig):
        return hint.from_dict(value)
    if typing.get_origin(hint) is tuple and isinstance(value, (list, tuple)):
        items = typing.get_args(hint)
        kinds = [items[0]] * len(value) if items[-1] is Ellipsis else list(items)
        if len(kinds) == len(value):
            return tuple(_revive(kind, item) for kind, item in zip(kinds, value, strict=True))
    return value


def _fits(hint: Any, value: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_fits(option, value) for option in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        items = typing.get_args(hint)
        if not isinstance(value, tuple) or (items[-1] is not Ellipsis and len(items) != len(value)):
            return False
        return all(_fits(items[0] if items[-1] is Ellipsis else items[i], item) for i, item in enumerate(value))
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, hint)


def _expected(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(map(repr, typing.get_args(hint)))}"
    words = {
        int: "a whole number",
        float: "a number",
        bool: "True or False",
        str: "a string",
        types.NoneType: "None",
        tuple[str, ...]: "a tuple of strings",
    }
    if isinstance(hint, types.UnionType):
        return " or ".join(_expected(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple and hint not in words:
        items = [_expected(item) for item in typing.get_args(hint) if item is not Ellipsis]
        return f"a tuple of {items[0]}" if len(items) == 1 else f"({', '.join(items)})"
    return words.get(hint, f"a {getattr(hint, '__name__', hint)}")


@dataclass(frozen=True, kw_only=True)
class WeightConfig(JsonConfig):
    """How a layer's weight becomes integers: symmetric, one scale per output channel, round to nearest.

    bits: 2 to 8, or None to keep the weight as it is.
    search: "minmax" covers the largest weight of each channel; "mse" shrinks that range for the least error (p = 2.4),
        in 80 trials, each a pass over all weights; once for each weight that changed.
    """

    bits: int | None = 8
    search: WeightSearch = "minmax"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("bits", is_bits(self.bits), "None or 2 to 8", "Weights need at least 2 bits.")


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig(JsonConfig):
    """How an activation, or the residual of one, becomes integers.

    bits: 2 to 8; None passes the tensor on unrounded; 0 (modulated layers only) sends nothing and reuses the output.
    granularity: what shares a scale. "auto" is a scale per token for linear layers, per sample for convolutions;
        "input_channel" has its scale on the reduction axis, so no integer matmul can run it: for study only.
    dynamic: True measures the range on each call; False uses the scale that `modiff.calibrate` measured.
    clip: scale = clip * absmax / qmax; codes saturate. Under 1 it pays only in the closed loop.
    lowest: "zero" fixes the lower end of the range at 0, for values that are never negative (softmax outputs); these
        may have 16 bits.
    step_groups: of static scales: 1 set for all steps, one for each of n groups of neighbours, or 0 for one for each
        step. More than one set serves only the time steps it was calibrated on.
    step_bits: bits of each group of steps, the noisiest first; `bits` is the most of them. () has `bits` at all steps.
    refresh_every: of dynamic scales of modulated layers: measured at every n-th step, which saves a pass over memory at
        the others. Residuals that outgrow an old scale are clipped, and sent later.
    """

    bits: int | None = 8
    granularity: str = "auto"
    symmetric: bool = True
    dynamic: bool = True
    clip: float = 1.0
    lowest: Literal["measured", "zero"] = "measured"
    step_groups: int = 1
    step_bits: tuple[int, ...] = ()
    refresh_every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        special = (0, 16) if self.lowest == "zero" else (0,)
        self.check(
            "bits",
            is_bits(self.bits, special),
            "None, 0 or 2 to 8",
            "One bit has no symmetric code. Use 2 to 8, 0 to send nothing, None for floats.",
        )
        self.check("clip", 0 < self.clip <= 1, "a ratio in (0, 1]", "1.0 clips nothing.")
        self.check("granularity", self.granularity in GRANULARITIES, f"one of {str(GRANULARITIES)[1:-1]}",
                   "Register others with modiff.register_granularity.")  # fmt: skip
        static_row = not self.dynamic and self.granularity in ("sample", "token")
        self.check("granularity", not static_row, "'tensor', 'input_channel' or 'auto'",
                   "No static scale belongs to one sample or token. Use 'tensor' or dynamic=True.")  # fmt: skip
        self.check("lowest", self.lowest != "zero" or not self.symmetric, "'measured' with symmetric=True",
                   "A range from 0 is not symmetric. Use symmetric=False.")  # fmt: skip
        self.check("step_groups", self.step_groups >= 0, "0 or more groups", "0 is a set for each step, 1 for all.")
        self.check("step_groups", self.step_groups == 1 or not self.dynamic, "1 with dynamic=True",
                   "Dynamic scales are measured at each step anyway. Use dynamic=False.")  # fmt: skip
        bits, groups = self.step_bits, self.step_groups
        fits = len(bits) == groups != 1 and max(bits, default=0) == self.bits and all(map(is_bits, bits))
        self.check("step_bits", not bits or fits, f"{groups} numbers, 2 to {self.bits}, one for each of `step_groups` "
                   "groups", "`bits` is the most of them. Use () for the same bits everywhere.")  # fmt: skip
        self.check("refresh_every", self.refresh_every >= 1, "1 or more steps", "1 measures at each step.")
        self.check("refresh_every", self.refresh_every == 1 or self.dynamic, "1 with dynamic=False",
                   "Static scales are never measured again. Use dynamic=True.")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModulationConfig(JsonConfig):
    """The closed loop of a layer: how the next input is predicted and how the states are kept.

    predictor: "hold" predicts the last input state; "linear" adds gain times its last move; or a registered name.
    gain: weight of that move, in (0, 1]; on uneven schedules it is scaled by the ratio of the step sizes, at most 1.
    error_compensation: "closed_loop" codes what the state does not hold yet; "none" codes the raw difference of two
        inputs, as in the paper's ablation: its errors add up, so it is for study only.
    first_step: "full_precision" anchors the states on the unrounded input; "coded" sends it in `rounds` rounds.
    anchor_weights: the weight that meets the input where the states start. "exact" is the one before rounding: its
        rounding error then meets only what changes later; packed layers use what `modiff.pack` kept of it. "quantized"
        is the paper's form; a coded first step has it either way.
    reanchor_every: anchor again every this many steps; 0 never.
    stagger: at each step another 1/`reanchor_every` of the layers anchors again, those that share an input together.
    state_dtype: of both states; "auto" as `LayerConfig.state_dtype` says. float16 and bfloat16 drift; int16 hardly does
        (docs/algorithm.md): integers on a grid of the layer; a state that outgrows its grid starts again.
    """

    predictor: str = "hold"
    gain: float = 1.0
    error_compensation: Literal["closed_loop", "none"] = "closed_loop"
    first_step: Literal["full_precision", "coded"] = "full_precision"
    rounds: int = 1
    anchor_weights: Literal["exact", "quantized"] = "exact"
    reanchor_every: int = 0
    stagger: bool = True
    state_dtype: StateDtype = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("predictor", self.predictor in PREDICTORS, f"one of {str(PREDICTORS)[1:-1]}",
                   "Register others with modiff.register_predictor.")  # fmt: skip
        self.check("gain", 0 < self.gain <= 1, "a gain in (0, 1]", "Above 1 the loop diverges.")
        self.check("rounds", 1 <= self.rounds <= 16, "1 to 16 rounds", "4 suffice at 4 bits.")
        self.check("reanchor_every", self.reanchor_every >= 0, "0 or more steps", "0 never anchors again.")
        open_loop = self.predictor != "hold" and self.error_compensation == "none"
        self.check("predictor", not open_loop, "'hold' when error_compensation is 'none'",
                   "The ablation is of the published predictor. Use error_compensation='closed_loop'.")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LayerConfig(JsonConfig):
    """One layer: its weight, its activation, and whether the activation is modulated (None: plain quantization).

    smoothing: a positive number for each input channel, which divides the channel and multiplies its weights, so that
        one scale serves all channels; () for none. Without rounding the output is the same.
    large_channels: input channels that get a quantizer, and weight scales, of their own, as their values dwarf those of
        the others; `modiff.apply(..., run=)` finds them.
    rotation: "hadamard" rotates the input channels in blocks of `rotation_block`, or of the largest power of two that
        divides them; the weights take the inverse once and the states live in the rotated domain.
    execution: "simulated" computes with the values that the integers stand for; "integer" with the integers, where the
        layer and the machine have kernels for them: same codes, and `modiff explain` says which layers and why.
    """

    weight: WeightConfig = WeightConfig()
    activation: QuantizerConfig = QuantizerConfig()
    modulation: ModulationConfig | None = ModulationConfig()
    rotation: Rotation = "none"
    rotation_block: int = 64
    smoothing: tuple[float, ...] = ()
    large_channels: tuple[int, ...] = ()
    execution: Literal["simulated", "integer"] = "simulated"

    def __post_init__(self) -> None:
        super().__post_init__()
        power = self.rotation_block >= 2 and self.rotation_block & (self.rotation_block - 1) == 0
        self.check("rotation_block", power, "a power of two from 2 up", "64 is a good one.")
        positive = all(0 < factor < float("inf") for factor in self.smoothing)
        self.check("smoothing", positive, "positive numbers", "They divide channels.")
        rising = sorted(set(self.large_channels)) == [*self.large_channels] and min(self.large_channels, default=0) >= 0
        self.check("large_channels", rising, "rising indices of channels", "Each has one place.")
        bits, clip = self.activation.bits, self.activation.clip
        self.check("activation.bits", bits != 16, "None, 0 or 2 to 8",
                   "16 bits are for softmax outputs: see AttentionConfig. Use None for full precision.")  # fmt: skip
        if self.modulation is None:
            self.check("activation.refresh_every", self.activation.refresh_every == 1, "1 without modulation",
                       "A plain layer remembers no scale. Set modulation=ModulationConfig().")  # fmt: skip
            self.check("activation.bits", bits != 0, "2 to 8 bits without modulation",
                       "Zero bits reuse a state; plain layers have none. Give them modulation.")  # fmt: skip
            return
        self.check("activation.lowest", self.activation.lowest == "measured", "'measured' with modulation",
                   "Residuals have either sign. Use modulation=None.")  # fmt: skip
        coded_nothing = bits == 0 and self.modulation.first_step == "coded"
        self.check("modulation.first_step", not coded_nothing, "'full_precision' at 0 bits",
                   "Rounds of zero bits never reach the input. Use first_step='full_precision'.")  # fmt: skip
        for name, required, why in _INT16 if self.modulation.state_dtype == "int16" else ():
            self.check(name, attrgetter(name)(self) == required, f"{required!r} with state_dtype='int16'",
                       f"{why} Use state_dtype='auto'.")  # fmt: skip
        if self.modulation.predictor == "linear" and bits is not None:
            stable = bits >= 4 or (bits == 3 and clip < 1) or bits == 0
            self.check("modulation.predictor", stable, f"'hold' at {bits} bits with clip {clip}",
                       "Extrapolation amplifies coarse codes until the loop diverges. "
                       "Use predictor='hold', or 3 bits with clip under 1.")  # fmt: skip

    @property
    def setting(self) -> str:
        """Short form, for example "W8A4 modulated"."""
        weight, activation = self.weight.bits or 32, self.activation.bits
        mode = " plain" if self.modulation is None else " modulated"
        return f"W{weight}A32" if activation is None else f"W{weight}A{activation}{mode}"

    @property
    def state_dtype(self) -> StateDtype:
        """With "auto" int16 on integers where that is exact, otherwise float32, as without a kernel and on GPUs."""
        dtype = "auto" if self.modulation is None else self.modulation.state_dtype
        fits = self.modulation is not None and all(attrgetter(name)(self) == each for name, each, _ in _INT16)
        return dtype if dtype != "auto" else "int16" if fits else "float32"


_INT16 = (  # what such states need of a layer's config, and why
    ("execution", "integer", "Only kernels keep integers."),
    ("activation.dynamic", True, "A static scale is no multiple of the grid."),
    ("activation.refresh_every", 1, "An old scale may leave 16 bits."),
    ("modulation.predictor", "hold", "A move is no multiple of the grid."),
    ("modulation.first_step", "full_precision", "The grid is made from whole inputs."),
)


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(JsonConfig):
    """The two products inside attention, softmax(q k^T / sqrt(d)) v: how their operands become integers, unmodulated.

    operands: q, k and v. "auto" is a scale per token for q and k and per sample for v when dynamic, else per tensor.
    softmax: the probabilities, from 0 up; 8 bits, 16 for Stable Diffusion (Q-Diffusion). "auto" is a scale per query.
    include, exclude: fnmatch patterns on names of attention modules.
    """

    operands: QuantizerConfig = QuantizerConfig()
    softmax: QuantizerConfig = QuantizerConfig(symmetric=False, lowest="zero")
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        q, p = self.operands, self.softmax
        for name, quantizer in (("operands", q), ("softmax", p)):
            self.check(f"{name}.bits", quantizer.bits != 0, "None or bits to code with",
                       "Zero bits reuse a state; these products have none. Use None for full precision.")  # fmt: skip
        self.check("operands.granularity", q.granularity in ("auto", "tensor", "sample"),
                   "'auto', 'tensor' or 'sample'", "v is summed over its tokens, q and k over channels.")  # fmt: skip
        self.check("operands.lowest", q.lowest == "measured", "'measured'", "q, k and v have either sign.")
        self.check("softmax.granularity", p.granularity != "input_channel", "'auto', 'tensor', 'sample' or 'token'",
                   "Probabilities are summed over their last axis.")  # fmt: skip
        self.check("softmax.lowest", p.lowest == "zero", "'zero'",
                   "They are never negative. Use QuantizerConfig(symmetric=False, lowest='zero').")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModiffConfig(JsonConfig):
    """A whole model: the config of its layers, which layers are taken, and what they share.

    include, exclude: fnmatch patterns on module names.
    default_exclude: patterns that are left out as well; None: those of the network's host, () none.
    overrides: (pattern, LayerConfig) pairs, the last match wins.
    first_last: "full_precision" leaves the first and the last layer of the network alone.
    min_weights: layers with fewer weights are left alone.
    share_residuals: "auto" lets layers that read the same tensor (q, k, v; gate, up) share one coded residual.
        Inference tensors are known by their bytes; on GPUs each layer codes them for itself.
    split_shortcuts: "auto" gives the two halves of a U-Net's concatenated skip input a quantizer each.
    attention: quantizers of the attention products; None leaves them in full precision.
    """

    layer: LayerConfig = LayerConfig()
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    default_exclude: tuple[str, ...] | None = None
    overrides: tuple[tuple[str, LayerConfig], ...] = ()
    first_last: Literal["full_precision", "quantize"] = "full_precision"
    min_weights: int = 256
    share_residuals: Automatic = "auto"
    split_shortcuts: Automatic = "auto"
    attention: AttentionConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("min_weights", self.min_weights >= 0, "0 or more", "0 takes layers of any size.")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Rebuild a config; in one from before `default_exclude` existed, `exclude` replaces the defaults, as then."""
        if isinstance(values, dict) and set(typing.get_type_hints(cls)) - set(values) == {"default_exclude"}:
            values = values | ({"exclude": []} if values["exclude"] is None else {"default_exclude": []})
        return super().from_dict(values)

    def on_integers(self) -> Self:
        """The same, executed on integers, the overrides too."""

        def on_integers(layer: LayerConfig) -> LayerConfig:
            return dataclasses.replace(layer, execution="integer")

        overrides = tuple((pattern, on_integers(layer)) for pattern, layer in self.overrides)
        return dataclasses.replace(self, layer=on_integers(self.layer), overrides=overrides)
