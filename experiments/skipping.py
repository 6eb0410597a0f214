"""Quantizers for study only: one that sends nothing while the residual is small, and one that starts exactly.

The recursion is the library's own (`core.recursion`, `nn.loop`); only the quantizer is replaced by one that may keep
silent. What is not sent stays in the residual, so the law ô = A(â) + bias still holds, and a layer that keeps silent
does no multiply-add: `Tally` counts those that ran.
"""

import functools
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from modiff.config import JsonConfig, ModulationConfig, check
from modiff.core.affine import QParams
from modiff.core.quantizer import Code, Quantizer
from modiff.core.recursion import Update
from modiff.errors import ConfigError
from modiff.evaluate.cost import LayerCost
from modiff.kernels.input_fusion import InputFusion
from modiff.model.attach import required_attachment
from modiff.model.report import Report
from modiff.nn import Clock
from modiff.nn.loop.simulated import InputGroup, InputState
from modiff.nn.operator import LayerSpec

Unit = Literal["layer", "block", "sample", "token"]
Decisions = dict[str, tuple[int, Tensor]]
"""Of each block: its last evaluation, and True where something is sent, broadcastable to the residual."""


@dataclass(frozen=True, kw_only=True)
class SkipRule(JsonConfig):
    """A unit keeps silent while ||r|| <= threshold ||a||, both over the unit.

    unit: "layer" decides for a layer and the whole batch; "block" once for a block of layers, by the first of them
        that runs; "sample" for a layer and one sample; "token" for a layer and one token or pixel, whose ||a|| is the
        root mean square over the sample's tokens.
    """

    unit: Unit
    threshold: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check("SkipRule.threshold", self.threshold, self.threshold >= 0, "0 or more", "0 skips still inputs only.")


class Tally:
    """How often each layer ran: `rows` samples in all, the `starts` among them, and what was `sent` of the others.

    A layer that skips half of its tokens has sent half a row. Tokens are counted at the input: convolutions are
    credited with the taps of every pixel that keeps silent, which only a kernel that scatters single pixels could save.
    """

    def __init__(self) -> None:
        self.rows, self.starts, self.sent = Counter[str](), Counter[str](), Counter[str]()

    def add(self, name: str, rows: int, share: float, starts: bool) -> None:
        """One call of a layer."""
        self.rows[name] += rows
        (self.starts if starts else self.sent)[name] += rows * share

    def shares(self, name: str) -> tuple[float, float]:
        """Shares of a layer's calls that started the states, and that sent a residual; the rest was skipped."""
        return self.starts[name] / self.rows[name], self.sent[name] / self.rows[name]

    def gbops(self, cost: list[LayerCost], report: Report, evaluations: int) -> float:
        """As `trajectory_gbops`, with layers counted as often as they ran: starts at 32 bits, codes at their own.

        A layer at 0 bits sends floats where it sends: 32 bits.
        """
        configs = {entry.name: entry.config for entry in report.taken}
        total = 0.0
        for layer in cost:
            config = configs.get(layer.name)
            if config is None:
                total += evaluations * layer.bops(None, None)
                continue
            starts, sent = self.shares(layer.name)
            weight, activation = config.weight.bits, config.activation.bits or None
            total += evaluations * (starts * layer.bops(weight, None) + sent * layer.bops(weight, activation))
        return total / 1e9


def skip_below(model: nn.Module, rule: SkipRule) -> Tally:
    """Let every modulated layer of a model keep silent by the rule, until `remove`.

    Layers at 0 bits send the residual itself, those with bits their codes of what is sent.
    Returns: the count, which grows as the model runs.
    Raises: StateError if modiff was not applied; ConfigError for plain layers, which have no state to hold.
    """
    tally, decisions = Tally(), {}
    quantized_layers = required_attachment(model, "skip_below").layers
    for name, quantized in quantized_layers.items():
        config = quantized.config
        if quantized.quantizer is None or config.modulation is None or not config.activation.dynamic:
            raise ConfigError(
                f"{name}: expected a modulated layer with dynamic scales, got {config.to_dict()}. What is not sent is "
                "repeated from a state, and no static scale was measured on what is. Use 0 or 2 to 8 bits with "
                "modulation=ModulationConfig()."
            )
    for name, quantized in quantized_layers.items():
        if quantized.quantizer is not None and quantized.config.modulation is not None:
            quantizer = _SilentQuantizer(quantized.quantizer, rule, decisions, block_of(name), quantized.clock)
            make = functools.partial(_Input, quantized.spec, quantizer, quantized.config.modulation, tally)
            quantized.loop.inputs = _Inputs(make, quantized.clock)
    return tally


def block_of(name: str) -> str:
    """The innermost member of a list of blocks that a layer sits in; the layer itself if there is none.

    >>> block_of("down_blocks.0.resnets.1.conv1"), block_of("mid_block.attentions.0.to_out.0"), block_of("conv_out")
    ('down_blocks.0.resnets.1', 'mid_block.attentions.0', 'conv_out')
    """
    parts = name.split(".")
    ends = [i for i in range(1, len(parts) - 1) if parts[i].isdecimal() and parts[i - 1].endswith("s")]
    return ".".join(parts[: ends[-1] + 1]) if ends else name


def exact_code(residual: Tensor, channel_dim: int) -> Code:
    """A code that stands for the residual itself: floats with scale 1."""
    return Code(((residual, QParams(torch.ones((), dtype=residual.dtype, device=residual.device), None)),), channel_dim)


class _SilentQuantizer(Quantizer):
    """The layer's quantizer behind the rule. share: what the last residual sent, 0 to 1."""

    def __init__(self, quantizer: Quantizer, rule: SkipRule, decisions: Decisions, block: str, clock: Clock) -> None:
        super().__init__(quantizer.config, quantizer.granularity, quantizer.channel_dim, quantizer.runs)
        self.rule, self.decisions, self.block, self.clock = rule, decisions, block, clock
        self.input: Tensor | None = None
        self.share = 1.0

    def __call__(self, residual: Tensor) -> Code | None:
        """Codes of what is sent; None if nothing is."""
        sent = self._sent(residual)
        self.share = float(sent.double().mean())
        if self.share == 0:
            return None
        kept = residual if self.share == 1 else residual * sent
        return exact_code(kept, self.channel_dim) if self.bits == 0 else self.fresh(kept)

    def _sent(self, residual: Tensor) -> Tensor:
        """True where something is sent, broadcastable to the residual."""
        if self.rule.unit != "block":
            return self._decide(residual)
        tick, decision = self.decisions.get(self.block, (-1, residual))
        if tick != self.clock.tick:  # the first layer of the block to run
            decision = self._decide(residual)
            self.decisions[self.block] = self.clock.tick, decision
        return decision

    def _decide(self, residual: Tensor) -> Tensor:
        value = residual if self.input is None else self.input.to(residual.dtype)
        samples, channel = tuple(range(1, residual.dim())), self.channel_dim % residual.dim()
        if self.rule.unit == "token":
            small, large = _energy(residual, (channel,)), _energy(value, (channel,))
            others = tuple(d for d in samples if d != channel)
            large = large.mean(others, keepdim=True) if others else large
        else:
            dims = samples if self.rule.unit == "sample" else tuple(range(residual.dim()))
            small, large = _energy(residual, dims), _energy(value, dims)
        return ~(small <= self.rule.threshold**2 * large)  # NaN is sent, so that it is seen


def _energy(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return x.double().square().sum(dims, keepdim=True)


class _Inputs(InputGroup):
    """The input states of one layer: nothing is shared, so that every layer is counted by itself."""

    def state_for(self, x: Tensor, read: int | None) -> InputState:
        """One for each call."""
        self.states.append(self.make())
        return self.states[-1]


class _Input(InputState):
    """Shows the quantizer the input that a residual belongs to, and counts what was sent."""

    def __init__(self, spec: LayerSpec, quantizer: _SilentQuantizer, config: ModulationConfig, tally: Tally) -> None:
        super().__init__(spec, quantizer, config, quantizer.clock)
        self.silent, self.tally = quantizer, tally

    def advance(self, x: Tensor, fusion: InputFusion | None) -> Update:
        """Encode `x`, counted."""
        self.silent.input = self.spec.prepared(x, fusion)
        update = super().advance(x, fusion)
        self.silent.input = None
        self.tally.add(self.spec.name, x.shape[0], 1.0 if update.starts else self.silent.share, update.starts)
        return update


def full_precision_first_step(model: nn.Module) -> None:
    """Let plain layers pass their input on unrounded at the first step of each trajectory, until `remove`.

    Raises: StateError if modiff was not applied; ConfigError for modulated layers, whose config says how they start.
    """
    quantized_layers = required_attachment(model, "full_precision_first_step").layers
    for name, quantized in quantized_layers.items():
        if quantized.quantizer is None or quantized.config.modulation is not None:
            raise ConfigError(
                f"{name}: expected a plainly quantized layer, got {quantized.config.to_dict()}. Modulated layers have "
                "ModulationConfig(first_step=...). Use presets.plain(...)."
            )
    for quantized in quantized_layers.values():
        if quantized.quantizer is not None:
            quantized.loop.quantizer = _FirstStepQuantizer(quantized.quantizer, quantized.clock)


class _FirstStepQuantizer(Quantizer):
    """The layer's quantizer from the second step on."""

    def __init__(self, quantizer: Quantizer, clock: Clock) -> None:
        super().__init__(quantizer.config, quantizer.granularity, quantizer.channel_dim, quantizer.runs)
        self.clock = clock

    def __call__(self, residual: Tensor) -> Code | None:
        """The activation itself at the first step, its codes at all others."""
        # a plain layer needs no trajectory; outside of one there is no first step
        if self.clock.active and self.clock.step == 0:
            return exact_code(residual, self.channel_dim)
        return super().__call__(residual)
