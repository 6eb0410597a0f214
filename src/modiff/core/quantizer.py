"""Turns a residual into integer codes: a quantizer config, resolved for one layer, with its measured scales."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from modiff.config import QuantizerConfig
from modiff.core.affine import QParams, choose_qparams, dequantize, noise_of, quantize_tensor, unsent
from modiff.core.granularity import granularity_named, positions
from modiff.core.observers import Observer
from modiff.core.step_sets import (
    OF_VALUES,
    Moment,
    Tables,
    grouped,
    read_indices,
    read_scale_tensors,
    scale_tensors,
    set_of,
)
from modiff.errors import CalibrationError, ConfigError


class Code:
    """The integers that one step sends for one tensor, one pair for each run of its channels.

    parts: (int8 codes, their scale and zero point); they lie next to each other along `channel_dim`.
    """

    def __init__(self, parts: tuple[tuple[Tensor, QParams], ...], channel_dim: int) -> None:
        self.parts, self.channel_dim = parts, channel_dim
        self._value: Tensor | None = None

    def value(self) -> Tensor:
        """What the codes stand for, in the dtype of the scales; computed once, for the state and for each reader."""
        if self._value is None:
            first, *others = self.parts
            self._value = dequantize(*first)
            if others:
                self._value = torch.cat([self._value, *(dequantize(*part) for part in others)], self.channel_dim)
        return self._value


class Sums(NamedTuple):
    """What errs if values are coded, or residuals, over the steps that a sampler remembers, 1 for the last of them.

    value, change: what rounding of the weight acts on, without what is the same at all tokens or pixels. error: of the
    codes of values, in scales. squares: those of the weights of the steps.
    """

    value: Tensor
    change: Tensor
    error: Tensor
    squares: float


class Quantizer:
    """code(r) = clamp(round(r / s), qmin, qmax) with s = clip * max|r| / qmax, for each run of the channels.

    Args:
        granularity: resolved, not "auto". channel_dim: -1 for linear layers, 1 for convolutions.
        runs: channel counts that get a quantizer each; one run is the usual case, two a split shortcut.
        moment: tells the steps of a trajectory apart; needed where `config.step_groups` is not 1.

    finds_jumps: whether the scales of a residual may be compared with those of its value. unsent: as `affine.unsent`.
    static: the scales of all steps. tables: or one set of scales for each group of steps; `moments` says which group a
    moment belongs to. Both are None before calibration, and with dynamic scales. With `config.step_bits`, each group of
    steps has codes of its own bits, and a fresh scale is for `bits`.
    of_values: indices of the sets that were measured on values, as residuals had more noise: these steps predict zero,
    as samples that jump do. The only set has index 0.
    weight_noise: mean square of what rounding took from the weight, over that of the weight; decides that too.
    reads_one_row: whether the inputs of the last measurement had one row a sample, neither tokens nor pixels.
    """

    def __init__(
        self, config: QuantizerConfig, granularity: str, channel_dim: int, runs: tuple[int, ...],
        moment: Callable[[], Moment] | None = None,
    ) -> None:  # fmt: skip
        if config.bits is None:
            raise ConfigError(
                "Quantizer.bits: expected 0 or 2 to 8, got None. Full precision has no codes. Skip the quantizer."
            )
        if not config.dynamic and not granularity_named(granularity).static:
            if config.granularity not in ("auto", "sample", "token"):
                raise ConfigError(
                    f"Quantizer.granularity: expected one whose scales can be measured before, got {granularity!r} "
                    "with dynamic=False. Its scales belong to one input. Use dynamic=True."
                )
            granularity = "tensor"  # "auto" of a static quantizer: one scale that was measured before
        self.config, self.bits, self.granularity = config, config.bits, granularity
        self.channel_dim, self.runs, self.moment = channel_dim, runs, moment
        self.finds_jumps = config.dynamic and bool(config.bits)
        self.unsent = unsent(config.bits, config.clip) if config.bits else 1.0
        self.static: tuple[QParams, ...] | None = None
        self.tables: dict[int, tuple[QParams, ...]] | None = None
        self.moments: dict[Moment, int] = {}
        self.of_values: frozenset[int] = frozenset()
        self.weight_noise = 0.0
        self.reads_one_row = True
        self._make: Callable[[], Observer] | None = None
        self._watched: dict[Moment, tuple[Observer, ...]] = {}
        self._values: dict[Moment, tuple[Observer, ...]] = {}
        self._added: dict[Moment, list[tuple[float, ...]]] = {}

    def __call__(self, residual: Tensor) -> Code | None:
        """Codes of a residual, with the static scales if the config asks for them; None at 0 bits.

        Raises: CalibrationError if static scales were never measured, or not at this step.
        """
        if self.bits == 0:
            return None
        if self._make is not None:
            self._observe(residual, self._watched)
        elif not self.config.dynamic:
            measured = self._measured_scales(residual.device)
            return self.scaled(residual, [QParams(q.scale.to(residual.dtype), q.zero_point) for q in measured])
        return self.fresh(residual)

    def fresh(self, residual: Tensor) -> Code | None:
        """Codes with scales measured on this very tensor, also for static configs (first-step rounds need them)."""
        return None if self.bits == 0 else self.scaled(residual, None)

    def measured(self, run: Tensor) -> QParams:
        """The scales that this very run of channels needs. Cost: a pass over it."""
        values = run.clamp_min(0) if self.config.lowest == "zero" else run  # nothing below zero for unsigned values
        return choose_qparams(values, self.bits, self.granularity, symmetric=self.config.symmetric,
                              clip=self.config.clip, channel_dim=self.channel_dim)  # fmt: skip

    def scaled(self, residual: Tensor, scales: Sequence[QParams] | None) -> Code:
        """Codes of a residual with known scales, one for each run of channels; None measures them."""
        parts, narrow = [], self.config.step_bits and self.tables and scales is not None
        bits = self.config.step_bits[set_of(self._now(), self.moments)] if narrow else self.bits
        for index, run in enumerate(self.split(residual)):
            qparams = self.measured(run) if scales is None else scales[index]
            parts.append((quantize_tensor(run, qparams, bits), qparams))
        return Code(tuple(parts), self.channel_dim)

    def observe_value(self, value: Tensor, anchor: Tensor | None, before: Sums | None, kept: float) -> Sums:
        """While scales are measured: the value whose residual is coded next, and where its states started.

        `freeze` takes what has less noise. anchor: None where the quantized weight met it, as it meets the value.
        before: of this trajectory's steps so far. kept: how much of their errors is still there, 0 to 1.
        """
        self.reads_one_row = value.dim() < 3
        now = self._observe(value, self._values)
        if before is None or before.value.shape != value.shape:
            before = Sums(zero := torch.zeros_like(value), zero, zero, 0.0)
        terms, axes = [value, value if anchor is None else value - anchor], positions(value, self.channel_dim)
        terms = [x - x.mean(axes, keepdim=True) for x in terms] if axes else terms
        codes = self.scaled(value, None)
        terms.append((value - codes.value()) / noise_of([q for _, q in codes.parts], self.runs).sqrt())
        values, changes, errors = (kept * x + term for x, term in zip(before[:3], terms, strict=True))
        sums = Sums(values, changes, errors, kept**2 * before.squares + 1)
        self._added.setdefault(now, []).append((sums.squares, *(float(x.square().mean()) for x in sums[:3])))
        return sums

    def _observe(self, x: Tensor, watched: dict[Moment, tuple[Observer, ...]]) -> Moment:
        now: Moment = () if self.config.step_groups == 1 else self._now()
        if now not in watched and self._make is not None:
            watched[now] = tuple(self._make() for _ in self.runs)
        for observer, run in zip(watched[now], self.split(x), strict=True):
            observer.observe(run.clamp_min(0) if self.config.lowest == "zero" else run)
        return now

    def intra(self, x: Tensor) -> Tensor | None:
        """Flags of the samples that this step predicts as zero: all, where its static scales are those of values."""
        if self.watching:
            return None
        index = 0 if self.tables is None else set_of(self._now(), self.moments)
        return torch.ones([1] * x.dim(), dtype=torch.bool, device=x.device) if index in self.of_values else None

    @property
    def observed_dim(self) -> int | None:
        """The axis along which observers keep a range for each index; None for one range of the whole tensor."""
        return self.channel_dim if granularity_named(self.granularity).per_channel else None

    @property
    def watching(self) -> bool:
        """Whether scales are being measured."""
        return self._make is not None

    def scales(self, like: Tensor) -> tuple[Tensor, ...] | None:
        """The scales of this step, one for each run, on the device of `like`; None where each call measures them.

        Raises: CalibrationError as a call does.
        """
        if self.config.dynamic:
            return None
        return tuple(q.scale.to(torch.float32) for q in self._measured_scales(like.device))

    def watch(self, make: Callable[[], Observer]) -> None:
        """Measure from now on, with an observer from `make` for each run (and each moment, with step groups)."""
        self._make, self._watched, self._values, self._added = make, {}, {}, {}

    def unwatch(self) -> None:
        """Stop measuring and forget what was seen; scales measured before stay."""
        self._make, self._watched, self._values, self._added = None, {}, {}, {}

    @property
    def saw_nothing(self) -> bool:
        """Whether no tensor came since `watch`."""
        return not self._watched

    def freeze(self, *, residuals: bool = False) -> None:
        """Turn what the observers saw into static scales.

        residuals: of residuals at every step, whatever values need.
        Raises: CalibrationError if they saw nothing.
        """
        if not self._watched and self._make is not None:
            self._make().range()  # raises: nothing was seen
        groups = self.config.step_groups
        (tables, moments), (values, sets) = self._frozen(self._watched), self._frozen(self._values)
        self.of_values = frozenset() if residuals else self._with_less_noise(tables, values, sets)
        tables |= {index: values[index] for index in self.of_values}
        if groups == 1:
            self.static = tables[0]
        else:
            self.tables, self.moments = tables, moments
        self.unwatch()

    def _frozen(self, watched: dict[Moment, tuple[Observer, ...]]) -> tuple[Tables, dict[Moment, int]]:
        config, (merged, moments) = self.config, grouped(watched, self.config.step_groups)
        bits = config.step_bits or (self.bits,) * len(merged)
        if watched and len(bits) != len(merged):
            raise CalibrationError(
                f"Quantizer: expected {len(bits)} steps or more, one for each of step_bits, got {len(merged)}. Nobody "
                "knows which steps they are. Calibrate with as many steps as you sample with."
            )
        tables = {
            index: tuple(o.qparams(bits[index], symmetric=config.symmetric, clip=config.clip) for o in observers)
            for index, observers in merged.items()
        }
        return tables, moments

    def _with_less_noise(self, tables: Tables, values: Tables, sets: dict[Moment, int]) -> frozenset[int]:
        """Sets whose values are coded with less noise than their residuals, that of the weight included.

        Rounding of the weight acts on the change since the anchor; after a step that predicts zero, on the value. Its
        errors of the steps that a sampler remembers add up, and what codes of values miss, where these hardly move;
        what those of residuals miss is new at each step.
        """
        less: set[int] = set()
        for index in sorted(values):
            added = [each for moment in sets if sets[moment] == index for each in self._added[moment]]
            squares, value, change, error = (sum(each) / len(added) for each in zip(*added, strict=True))
            noise, other = (float(noise_of(each[index], self.runs)) for each in (values, tables))
            noise, other = noise * error, other / 12 * squares
            if noise + self.weight_noise * value < other + self.weight_noise * (value if less else change):
                less.add(index)
        return frozenset(less)

    def state_dict_tensors(self) -> dict[str, Tensor]:
        """The measured scales by stable names, for `load_tensors`; {} for dynamic scales and before calibration."""
        of_values = {OF_VALUES: torch.tensor(sorted(self.of_values))} if self.of_values else {}
        return scale_tensors(self.static, self.tables, self.moments) | of_values

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take the scales that `state_dict_tensors` gave. Raises: FormatError if they do not fit this quantizer."""
        channels = (1,) * len(self.runs) if self.observed_dim is None else self.runs
        sets = {name: tensor for name, tensor in tensors.items() if name != OF_VALUES}
        self.static, self.tables, self.moments = read_scale_tensors(sets, channels, symmetric=self.config.symmetric)
        self.of_values = read_indices(tensors.get(OF_VALUES), 1 if self.tables is None else len(self.tables))

    def _measured_scales(self, device: torch.device) -> tuple[QParams, ...]:
        if self.tables is not None:
            index = set_of(self._now(), self.moments)
            self.tables[index] = _on(self.tables[index], device)
            return self.tables[index]
        if self.static is None:
            raise CalibrationError(
                "Quantizer: expected measured scales, got none. The config says dynamic=False. "
                "Call modiff.calibrate(model, lambda: pipe(...)) first."
            )
        self.static = _on(self.static, device)
        return self.static

    def _now(self) -> Moment:
        if self.moment is None:
            raise CalibrationError(
                "Quantizer: expected a clock that tells the steps apart, got none. Scales per step belong to a layer "
                "of a model. Use step_groups=1."
            )
        return self.moment()

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """The runs of channels."""
        return (x,) if len(self.runs) == 1 else x.split_with_sizes(self.runs, self.channel_dim)


def _on(measured: tuple[QParams, ...], device: torch.device) -> tuple[QParams, ...]:
    if all(q.scale.device == device for q in measured):
        return measured
    return tuple(
        QParams(q.scale.to(device), None if q.zero_point is None else q.zero_point.to(device)) for q in measured
    )
