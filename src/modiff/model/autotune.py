"""Which layers pay? For each, the fastest of floats, plain integers and modulated integers that is exact enough."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from modiff.config import LayerConfig, ModiffConfig, check
from modiff.errors import CalibrationError, ConfigError, StateError
from modiff.kernels.roofline import Reached, bytes_moved, roofline_seconds
from modiff.model.attach import attachment_of
from modiff.model.autotune_choice import GateRow, choose
from modiff.model.layer_times import MODES, Profile, Seconds, measurable, measure_layer, modulated, plain, signature
from modiff.model.probe import Probe, probes_of
from modiff.model.report import Report
from modiff.model.select import select_layers
from modiff.nn.integer import unsupported


@dataclasses.dataclass(frozen=True)
class AutotuneResult:
    """What was chosen for each layer that the config selects, and why. Prints as a table.

    config: for `modiff.apply`; layers that stay in floats are excluded, plain ones are overrides. Where no layer
    `pays`, there is nothing to apply, and `apply` says so.
    """

    config: ModiffConfig
    rows: tuple[GateRow, ...]
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
        """What the states of the modulated layers take, float32, both sides."""
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
        return "\n".join(
            [f"{head}; states {self.state_bytes / 2**20:.1f} MiB", *(row.line(width) for row in self.rows)]
        )


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

    On one full-precision trajectory the coding error ||a - code(a)|| / ||a|| of the layer's input is measured for both
    integer modes; each kind of layer is then timed in all three. Scales are measured at each call in either, also where
    the config has static ones.

    Args:
        models: the networks that `run` evaluates; they get one config.
        run: runs one trajectory, with the batch and the number of steps to be used later.
        tolerance: the largest coding error that a layer may have.
        profile: what is known of this machine; what is missing is measured and added.
        splits: as for `apply`, for each of the models.
    Raises: StateError if modiff is on a model; ConfigError for a config with overrides or without modulation;
        CalibrationError if `run` never reached a second step.
    Cost: for each model a full-precision trajectory with two input sides per layer; some twenty calls of each kind of
        layer.
    """
    _check(models, config, tolerance)
    profile = Profile() if profile is None else profile
    rows: list[GateRow] = []
    for model, found in zip(models, list(splits) or [{}] * len(models), strict=True):
        split = found if config.split_shortcuts == "auto" else {}
        report = select_layers(model, config, splits=split)
        for probe, seen in _watched(model, report, run, config.layer, split):
            rows.append(_row(model.get_submodule(probe.name), probe, seen, config.layer, tolerance, profile))
    return AutotuneResult(_config(config, rows), tuple(rows), tolerance)


def _check(models: Sequence[nn.Module], config: ModiffConfig, tolerance: float) -> None:
    check(
        "autotune.tolerance", tolerance, tolerance > 0, "a relative error above 0", "0.01 is one percent of the input."
    )
    if any(attachment_of(model) is not None for model in models):
        raise StateError("autotune: expected a plain model, got one with modulated layers. Floats are one of "
                         "the choices. "
                         "Call modiff.remove(model) first.")  # fmt: skip
    if config.overrides:
        raise ConfigError("autotune: expected a config without overrides, got some. Autotune writes them. "
                          "Use exclude= for layers to leave alone.")  # fmt: skip
    if config.layer.activation.bits in (None, 0):
        raise ConfigError(f"autotune: expected 2 to 8 activation bits, got {config.layer.activation.bits}. "
                         "Without codes "
                          "there is nothing to choose. Use presets.w8a8().")  # fmt: skip


class _Seen:
    """Forward hook: the first input of a layer, the size of its output, and how often it was called."""

    def __init__(self) -> None:
        self.x: Tensor | None = None
        self.calls = self.outputs = 0

    def __call__(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.calls += 1
        if self.x is None:
            self.x, self.outputs = args[0].detach().clone(), output.numel()


def _watched(
    model: nn.Module, report: Report, run: Callable[[], object], layer: LayerConfig, splits: Mapping[str, int]
) -> list[tuple[Probe, _Seen]]:
    """The probes of all layers that ran, after one trajectory, and what they saw."""
    choices, hooks = [measurable(plain(layer)), measurable(modulated(layer))], [_Seen() for _ in report.taken]
    with ExitStack() as stack, torch.no_grad():
        probes = stack.enter_context(probes_of(model, report, choices, splits))
        for entry, hook in zip(report.taken, hooks, strict=True):
            stack.callback(model.get_submodule(entry.name).register_forward_hook(hook).remove)
        run()
    found = [(p, h) for p, h in zip(probes, hooks, strict=True) if not math.isnan(p.errors()[0])]
    if not found:
        raise CalibrationError("autotune: expected a trajectory of two steps or more, got fewer. A residual "
                         "needs a step "
                               "before it. Let run sample with several steps.")  # fmt: skip
    return found


def _row(
    layer: nn.Module, probe: Probe, seen: _Seen, config: LayerConfig, tolerance: float, profile: Profile
) -> GateRow:
    x, quantized = torch.as_tensor(seen.x), probe.layers[-1]
    key = signature(layer, x, config, quantized.split)
    if key not in profile.layers:
        profile.layers[key] = measure_layer(layer, x, config, quantized.split)
    seconds, (first, second) = profile.layers[key], probe.errors()
    choice, reason = choose(seconds, (first, second), tolerance, unsupported(quantized))
    return GateRow(
        name=probe.name, kind=type(layer).__name__, shape=tuple(x.shape), calls=seen.calls / probe.clock.tick,
        seconds=seconds, expected=_expected(layer, x, seen.outputs, quantized.config.activation.dynamic,
        profile.peaks()),
        errors=(first, second), state_bytes=4 * (x.numel() + seen.outputs), choice=choice, reason=reason,
    )  # fmt: skip


def _expected(layer: nn.Module, x: Tensor, outputs: int, dynamic: bool, reached: Reached) -> Seconds:
    weight = torch.as_tensor(layer.weight)
    operations = 2 * outputs * weight[0].numel()
    found: Seconds = {}
    for mode in MODES:
        moved = bytes_moved(mode, x.numel(), weight.numel(), outputs, dynamic=dynamic, itemsize=x.element_size())
        found[mode] = roofline_seconds(moved, operations, reached, integer=mode != "float")
    return found


def _config(config: ModiffConfig, rows: list[GateRow]) -> ModiffConfig:
    """The config that does what the rows say."""
    floats = tuple(dict.fromkeys(row.name for row in rows if row.choice == "float"))
    plains = tuple(dict.fromkeys(row.name for row in rows if row.choice == "plain"))
    return dataclasses.replace(
        config,
        layer=modulated(config.layer),
        exclude=config.exclude + floats,
        overrides=config.overrides + tuple((name, plain(config.layer)) for name in plains),
    )
