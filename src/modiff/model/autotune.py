"""Which layers pay? For each, the fastest of floats, plain integers and modulated integers that is exact enough."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from modiff.config import LayerConfig, ModiffConfig, check
from modiff.errors import CalibrationError, ConfigError, FormatError, StateError
from modiff.files import check_writable, write_json
from modiff.kernels.isa import machine
from modiff.kernels.layout import innermost
from modiff.model.attach import attachment_of
from modiff.model.facts import facts_of
from modiff.model.observe import observe
from modiff.model.probe import Probe, probes_of
from modiff.model.report import Report, execution_of
from modiff.model.roofline import Reached, bytes_moved, interleaved, measure_peaks, roofline_seconds
from modiff.model.select import select_layers
from modiff.nn import Clock, ModulatedLayer, quantized_class

Mode = Literal["float", "plain", "modulated"]
Seconds = dict[str, float]
"""Of one call in each mode."""
MODES: tuple[Mode, ...] = ("float", "plain", "modulated")
MARGIN = 0.97
"""Integers must take at most this share of the time of floats: less is noise, and floats have no error."""
_ROUNDS = 7


@dataclasses.dataclass
class Profile:
    """What was measured on one machine: its peaks, and the times of layers by `signature`."""

    reached: Reached | None = None
    layers: dict[str, Seconds] = dataclasses.field(default_factory=dict)

    def peaks(self) -> Reached:
        """Of the machine, measured once."""
        if self.reached is None:
            self.reached = measure_peaks()
        return self.reached

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, for JSON."""
        return {"peaks": None if self.reached is None else self.reached._asdict(), "layers": self.layers}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`. Raises: FormatError for anything else."""
        try:
            peaks, layers = values["peaks"], values["layers"]
            reached = None if peaks is None else Reached(**{name: float(value) for name, value in peaks.items()})
            return cls(reached, {str(key): {mode: float(row[mode]) for mode in MODES} for key, row in layers.items()})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(
                f"profile: expected peaks and times of layers, got something else ({error!r}). It was not written by "
                "modiff, or changed. Delete it: it is measured again."
            ) from None


@contextmanager
def stored_profile(path: str | Path | None) -> Iterator[Profile]:
    """This machine's profile in a JSON file, written back at the end with what the body added; None keeps no file.

    Raises: FormatError for a file that is not a profile, which is then left as it is; OSError.
    """
    if path is None:
        yield Profile()
        return
    profiles = _profiles(Path(path))
    profile = Profile.from_dict(profiles[machine()]) if machine() in profiles else Profile()
    check_writable(path)
    yield profile
    write_json(path, profiles | {machine(): profile.to_dict()})


def _profiles(path: Path) -> dict[str, Any]:
    """What the file holds, by machine."""
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise FormatError(
            f"{path}: expected a profile that modiff wrote, got something else. Delete it: it is measured again."
        )
    return values


@dataclasses.dataclass(frozen=True)
class AutotuneRow:
    """One layer.

    calls: of one evaluation. seconds: of one call in each mode, measured. expected: the least that memory and
    arithmetic of this machine allow. errors: of quantizing the input, plain and modulated. state_bytes: of both states,
    float32, if it is modulated. backend: which would run it on integers, and why; empty if none can.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    calls: float
    seconds: Seconds
    expected: Seconds
    errors: tuple[float, float]
    state_bytes: int
    choice: Mode
    reason: str
    backend: str = ""

    def line(self, width: int) -> str:
        """One line of a table: times in milliseconds, measured and (expected)."""
        times = "  ".join(f"{m} {1e3 * self.seconds[m]:.3f} ({1e3 * self.expected[m]:.3f})" for m in MODES)
        errors = f"error plain {self.errors[0]:.4f} modulated {self.errors[1]:.4f}"
        size = f"state {self.state_bytes / 2**20:.2f} MiB"
        return f"  {self.name:<{width}}  {self.choice:<9}  {times} ms  {errors}  {size}  {self.reason}"


@dataclasses.dataclass(frozen=True)
class AutotuneResult:
    """What was chosen for each layer that the config selects, and why. Prints as a table.

    config: for `modiff.apply`; layers that stay in floats are excluded, plain ones are overrides. Where no layer
    `pays`, there is nothing to apply, and `apply` says so.
    """

    config: ModiffConfig
    rows: tuple[AutotuneRow, ...]
    tolerance: float

    @property
    def pays(self) -> bool:
        """Whether any layer is better off on integers."""
        return any(row.choice != "float" for row in self.rows)

    def seconds(self, mode: str | None = None) -> float:
        """Of one evaluation: all layers in one mode, or each as it was chosen."""
        return sum(row.calls * row.seconds[mode or row.choice] for row in self.rows)

    @property
    def state_bytes(self) -> int:
        """What the states of the modulated layers take, float32, both states."""
        return sum(row.state_bytes for row in self.rows if row.choice == "modulated")

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON."""
        return {"tolerance": self.tolerance, "config": self.config.to_dict(), "state_bytes": self.state_bytes,
                "layers": [dataclasses.asdict(row) for row in self.rows]}  # fmt: skip

    def __str__(self) -> str:
        chosen = [row.choice for row in self.rows]
        counts = ", ".join(f"{chosen.count(mode)} {mode}" for mode in MODES)
        times = ", ".join(f"all {mode} {1e3 * self.seconds(mode):.1f}" for mode in MODES)
        head = f"{counts}; layers of one evaluation: {1e3 * self.seconds():.1f} ms as chosen, {times}"
        width = max((len(row.name) for row in self.rows), default=4)
        backends = [row.backend for row in self.rows if row.backend]
        lines = [f"{head}; states {self.state_bytes / 2**20:.1f} MiB"]
        lines += [f"  {backends.count(backend)} on {backend}" for backend in dict.fromkeys(backends)]
        return "\n".join([*lines, *(row.line(width) for row in self.rows)])


def choose_modes(
    models: Sequence[nn.Module],
    run: Callable[[], object],
    config: ModiffConfig,
    *,
    tolerance: float = 0.01,
    profile: Profile | None = None,
    splits: Sequence[Mapping[str, int]] = (),
) -> AutotuneResult:
    """Choose for each layer that `config` selects.

    On one full-precision trajectory the error ||a - quantized a|| / ||a|| of the layer's input is measured for both
    integer modes; each kind of layer is then timed in all three. Scales are measured at each call in either, also where
    the config has static ones.

    Args:
        models: the networks that `run` evaluates; they get one config.
        run: runs one trajectory, with the batch and the number of steps to be used later.
        tolerance: the largest such error that a layer may have.
        profile: what is known of this machine; what is missing is measured and added.
        splits: as for `apply`, for each of the models.
    Raises: StateError if modiff is on a model; ConfigError for a config with overrides or without modulation;
        CalibrationError if `run` never reached a second step.
    Cost: for each model a full-precision trajectory that quantizes each input twice; some twenty calls of each kind of
        layer.
    """
    _check(models, config, tolerance)
    profile = Profile() if profile is None else profile
    rows: list[AutotuneRow] = []
    for model, known in zip(models, list(splits) or [{}] * len(models), strict=True):
        split = known if config.split_shortcuts == "auto" else {}
        report = select_layers(model, config, splits=split)
        for probe, calls in _watched(model, report, run, config.layer, split):
            rows.append(_row(model.get_submodule(probe.name), probe, calls, config.layer, tolerance, profile))
    defaults = tuple(dict.fromkeys(p for model in models for p in facts_of(model).default_exclude))
    return AutotuneResult(_config(config, rows, defaults), tuple(rows), tolerance)


def _check(models: Sequence[nn.Module], config: ModiffConfig, tolerance: float) -> None:
    why = "0.01 is one percent of the input."
    check("autotune.tolerance", tolerance, tolerance > 0, "a relative error above 0", why)
    if any(attachment_of(model) is not None for model in models):
        raise StateError("autotune: expected a plain model, got one with modulated layers. Floats are one of the "
                         "choices. Call modiff.remove(model) first.")  # fmt: skip
    if config.overrides:
        raise ConfigError("autotune: expected a config without overrides, got some. Autotune writes them. "
                          "Use exclude= for layers to leave alone.")  # fmt: skip
    if config.layer.activation.bits in (None, 0):
        raise ConfigError(f"autotune: expected 2 to 8 activation bits, got {config.layer.activation.bits}. Without "
                          "codes there is nothing to choose. Use presets.w8a8().")  # fmt: skip


@dataclasses.dataclass
class _Calls:
    """x: the first input of a layer. outputs: size of an output. count: how often it was called."""

    x: Tensor
    outputs: int
    count: int = 0


def _watched(
    model: nn.Module, report: Report, run: Callable[[], object], layer: LayerConfig, splits: Mapping[str, int]
) -> list[tuple[Probe, _Calls]]:
    """The probes of all layers that ran, after one trajectory, and how they were called."""
    calls: dict[str, _Calls] = {}

    def on_layer(name: str, _: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if name not in calls:
            calls[name] = _Calls(inputs[0].detach().clone(), output.numel())
        calls[name].count += 1

    choices, names = [measurable(plain(layer)), measurable(modulated(layer))], [e.name for e in report.taken]
    with torch.no_grad(), probes_of(model, report, choices, splits) as probes, observe(model, on_layer, layers=names):
        run()
    ran = [(probe, calls[probe.name]) for probe in probes if not math.isnan(probe.errors()[0])]
    if not ran:
        raise CalibrationError("autotune: expected a trajectory of two steps or more, got fewer. A residual needs a "
                               "step before it. Let run sample with several steps.")  # fmt: skip
    return ran


def _row(
    layer: nn.Module, probe: Probe, calls: _Calls, config: LayerConfig, tolerance: float, profile: Profile
) -> AutotuneRow:
    x, quantized = calls.x, probe.layers[-1]
    key = signature(layer, x, config, quantized.spec.split)
    if key not in profile.layers:
        profile.layers[key] = measure_layer(layer, x, config, quantized.spec.split)
    seconds, (first, second) = profile.layers[key], probe.errors()
    choice, reason = choose(seconds, (first, second), tolerance, quantized.unsupported)
    execution, why = execution_of(quantized)
    dynamic = quantized.config.activation.dynamic
    return AutotuneRow(
        name=probe.name, kind=type(layer).__name__, shape=tuple(x.shape), calls=calls.count / probe.clock.tick,
        seconds=seconds, expected=_expected(layer, x, calls.outputs, dynamic, profile.peaks()), errors=(first, second),
        state_bytes=4 * (x.numel() + calls.outputs), choice=choice, reason=reason,
        backend="" if quantized.unsupported else f"{execution.removeprefix('integers on ')}: {why}",
    )  # fmt: skip


def _expected(layer: nn.Module, x: Tensor, outputs: int, dynamic: bool, reached: Reached) -> Seconds:
    weight = torch.as_tensor(layer.weight)
    operations = 2 * outputs * weight[0].numel()
    seconds: Seconds = {}
    for mode in MODES:
        moved = bytes_moved(mode, x.numel(), weight.numel(), outputs, dynamic=dynamic, itemsize=x.element_size())
        seconds[mode] = roofline_seconds(moved, operations, reached, integer=mode != "float")
    return seconds


def _config(config: ModiffConfig, rows: list[AutotuneRow], defaults: tuple[str, ...]) -> ModiffConfig:
    """The config that does what the rows say."""
    floats = tuple(dict.fromkeys(row.name for row in rows if row.choice == "float"))
    plains = dict.fromkeys(row.name for row in rows if row.choice == "plain")
    return dataclasses.replace(
        config,
        layer=modulated(config.layer),
        exclude=(defaults if config.exclude is None else config.exclude) + floats,
        overrides=config.overrides + tuple((name, plain(config.layer)) for name in plains),
    )


def choose(seconds: Seconds, errors: tuple[float, float], tolerance: float, unsupported: str = "") -> tuple[Mode, str]:
    """The fastest mode whose error is within the tolerance, and why; floats unless integers are clearly faster.

    Args:
        errors: plain, modulated. unsupported: why the layer cannot run on integers; empty if it can.

    >>> choose({"float": 3.0, "plain": 1.0, "modulated": 1.5}, (0.02, 0.001), 0.01)
    ('modulated', '2.00x as fast as floats')
    """
    if unsupported:
        return "float", f"no integers: {unsupported}"
    exact: list[Mode] = [m for m, error in zip(("plain", "modulated"), errors, strict=True) if error <= tolerance]
    if not exact:
        return "float", "no integers are exact enough"
    best = min(exact, key=lambda mode: seconds[mode])
    if seconds[best] > MARGIN * seconds["float"]:
        return "float", f"integers do not pay: {best} takes {seconds[best] / seconds['float']:.2f}x the time"
    return best, f"{seconds['float'] / seconds[best]:.2f}x as fast as floats"


def signature(layer: nn.Module, x: Tensor, config: LayerConfig, split: int | None) -> str:
    """What the time of a layer depends on: layers that share it are measured once."""
    activation, modulation = config.activation, config.modulation
    words = [
        str(layer.extra_repr()), f"x{tuple(x.shape)}", str(x.dtype).removeprefix("torch."), x.device.type,
        f"W{config.weight.bits}A{activation.bits}", activation.granularity,
        "dynamic" if activation.dynamic else "static", modulation.predictor if modulation else "hold",
        config.rotation, f"split {split}",
    ]  # fmt: skip
    return f"{type(layer).__name__}({'; '.join(words)})"


def measurable(config: LayerConfig) -> LayerConfig:
    """The same with scales that are measured at each call: static ones come later, from `modiff.calibrate`."""
    if config.activation.dynamic:
        return config
    activation = dataclasses.replace(config.activation, dynamic=True, granularity="tensor", step_groups=1)
    return dataclasses.replace(config, activation=activation)


def plain(config: LayerConfig) -> LayerConfig:
    """The same without memory, on integers."""
    return dataclasses.replace(config, modulation=None, rotation="none", execution="integer")


def modulated(config: LayerConfig) -> LayerConfig:
    """The same on integers. Raises: ConfigError for a config without modulation."""
    if config.modulation is None:
        raise ConfigError("autotune: expected a config with modulation, got none. It chooses between the two. "
                          "Use presets.modulated().")  # fmt: skip
    return dataclasses.replace(config, execution="integer")


def measure_layer(layer: nn.Module, x: Tensor, config: LayerConfig, split: int | None = None) -> Seconds:
    """The best of a few interleaved rounds, on an input like `x`; scales are measured at each call.

    Images come with their channels innermost in memory, as integer layers hand them on. Cost: some twenty calls.
    """
    kind = quantized_class(layer)
    if kind is None:
        raise ConfigError(f"autotune: expected a layer that modiff can modulate, got {type(layer).__name__}. "
                          "Exclude it.")  # fmt: skip
    x = innermost(x) if kind.channel_dim == 1 else x
    near = [x, (x * 1.01).to(x.dtype)]  # two inputs in turn: the residual is never zero
    runs = {"float": _alternating(layer, near)}
    for name, chosen in (("plain", plain(config)), ("modulated", modulated(config))):
        quantized = kind.from_float(layer, measurable(chosen), clock=Clock("autotune"), split=split)
        runs[name] = _alternating(_alone(quantized), near)
    with torch.no_grad():
        return {name: min(seconds) for name, seconds in interleaved(runs, _ROUNDS).items()}


def _alone(layer: ModulatedLayer) -> Callable[[Tensor], Tensor]:
    """A modulated layer that is a network of its own, as a function: each call is a step."""
    layer.clock.start()

    def run(x: Tensor) -> Tensor:
        layer.clock.call(None)
        output = layer(x)
        layer.clock.returned()
        return output

    return run


def _alternating(run: Callable[[Tensor], Tensor], inputs: list[Tensor]) -> Callable[[], Tensor]:
    run(inputs[0])  # a modulated layer starts its states: the steps after are the ones that count
    turns = itertools.cycle(reversed(inputs))
    return lambda: run(next(turns))
