"""Which layers pay? For each, the fastest of floats, plain integers and modulated integers that is exact enough."""

import dataclasses
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from modiff.config import LayerConfig, ModiffConfig, check
from modiff.errors import FormatError, PathError, warn_once
from modiff.files import check_writable, write_json
from modiff.kernels.isa import machine
from modiff.kernels.layout import innermost
from modiff.kernels.native import CACHE
from modiff.model.attach import check_searchable
from modiff.model.probe import Probe, probes_of, without_unfit
from modiff.model.report import execution_of
from modiff.model.select import layer_names, modulated_layer
from modiff.nn import Clock
from modiff.nn.adapters import modules_of

Mode = Literal["float", "plain", "modulated"]
Seconds = dict[str, float]
"""Of one call in each mode."""
Profile = dict[str, Seconds]
"""The times of layers on one machine, by `signature`."""
MODES: tuple[Mode, ...] = ("float", "plain", "modulated")
MARGIN = 0.97
"""Integers must take at most this share of the time of floats: less is noise, and floats have no error."""
_ROUNDS = 7


def if_writable(path: Path) -> Path | None:
    """The path, or None with a warning where it cannot be written, as in a container without a home."""
    try:
        check_writable(path)
    except PathError as error:
        warn_once(str(path), f"modiff: times of layers are kept for this call alone: {error} Set {CACHE} to a folder.")
        return None
    return path


@contextmanager
def stored_profile(path: str | Path | None) -> Iterator[Profile]:
    """This machine's profile in a JSON file, written back with what the body added, interrupted too; None: no file."""
    if path is None:
        yield {}
        return
    path = Path(path)
    try:
        profiles = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        layers = profiles.get(machine(), {"layers": {}})["layers"]
        profile = {str(key): {mode: float(row[mode]) for mode in MODES} for key, row in layers.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{path}: expected a profile that modiff wrote, got something else ({error!r}). It was "
                          "changed, or is another file. Delete it: it is measured again.") from None  # fmt: skip
    check_writable(path)
    try:
        yield profile
    finally:
        write_json(path, profiles | {machine(): {"layers": profile}})


@dataclasses.dataclass(frozen=True)
class AutotuneRow:
    """One layer.

    calls: of one evaluation. seconds: of one call in each mode. errors: of quantizing the input, plain and modulated.
    state_bytes: of all states, float32, if it is modulated. backend: of the integers, and why; empty if none can.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    calls: float
    seconds: Seconds
    errors: tuple[float, float]
    state_bytes: int
    choice: Mode
    reason: str
    backend: str = ""

    def __str__(self) -> str:
        times = "  ".join(f"{mode} {1e3 * self.seconds[mode]:.3f}" for mode in MODES)
        errors = f"error plain {self.errors[0]:.4f} modulated {self.errors[1]:.4f}"
        return f"{self.choice:<9}  {times} ms  {errors}  state {self.state_bytes / 2**20:.2f} MiB  {self.reason}"


@dataclasses.dataclass(frozen=True)
class AutotuneResult:
    """What was chosen for each layer that the config selects, and why. Prints as a table.

    config: for `modiff.apply`; layers that stay in floats are excluded, plain ones are overrides.
    """

    config: ModiffConfig
    rows: tuple[AutotuneRow, ...]
    tolerance: float

    @property
    def pays(self) -> bool:
        """Whether any layer is better off on integers; where none is, `apply` has nothing to take and says so."""
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
        chosen = Counter(row.choice for row in self.rows)
        counts = ", ".join(f"{chosen[mode]} {mode}" for mode in MODES)
        times = ", ".join(f"all {mode} {1e3 * self.seconds(mode):.1f}" for mode in MODES)
        head = f"{counts}; layers of one evaluation: {1e3 * self.seconds():.1f} ms as chosen, {times}"
        width = max((len(row.name) for row in self.rows), default=4)
        backends = [row.backend for row in self.rows if row.backend]
        lines = [f"{head}; states {self.state_bytes / 2**20:.1f} MiB"]
        lines += [f"  {count} on {backend}" for backend, count in Counter(backends).items()]
        return "\n".join([*lines, *(f"  {row.name:<{width}}  {row}" for row in self.rows)])


def choose_modes(
    models: Sequence[nn.Module],
    run: Callable[[], object],
    config: ModiffConfig,
    *,
    tolerance: float = 0.01,
    profile: Profile | None = None,
    splits: Sequence[Mapping[str, int]] = (),
) -> AutotuneResult:
    """Choose for each layer that `config` selects, as `modiff.autotune` says.

    On one full-precision trajectory the error ||a - quantized a|| / ||a|| of the layer's input is measured for both
    integer modes; each kind of layer that `profile` lacks is then timed in all three. Scales are measured at each call.
    """
    check_searchable(models, config, "autotune")
    loop = config.layer.modulation
    for name, value, valid, expected, why in (
        ("tolerance", tolerance, tolerance > 0, "a relative error above 0", "0.01 is one percent of the input."),
        ("config", config.overrides, not config.overrides, "no overrides", "Autotune writes them. Use exclude=."),
        ("config", loop, loop is not None, "modulation", "It chooses between the two. Use config='modulated:8:4'."),
    ):
        check(f"autotune.{name}", value, valid, expected, why)
    profile, choices, known = {} if profile is None else profile, _measured(config.layer), layer_names(models)
    rows: list[AutotuneRow] = []
    for model, split in zip(models, list(splits) or [{}] * len(models), strict=True):
        with torch.no_grad(), probes_of(model, config, choices, split, known) as probes:
            run()
        config, fit = without_unfit("autotune", config, probes)
        modules = modules_of(model)
        rows += [_row(modules[p.name], p, config.layer, tolerance, profile) for p in fit]
    named = {mode: dict.fromkeys(row.name for row in rows if row.choice == mode) for mode in MODES}
    layer = dataclasses.replace(config.layer, execution="integer")
    plain = dataclasses.replace(layer, modulation=None, rotation="none")
    overrides = tuple((escape(name), plain) for name in named["plain"])
    exclude = (*config.exclude, *map(escape, named["float"]))
    chosen = dataclasses.replace(config, layer=layer, exclude=exclude, overrides=overrides)
    return AutotuneResult(chosen, tuple(rows), tolerance)


def _row(layer: nn.Module, probe: Probe, config: LayerConfig, tolerance: float, profile: Profile) -> AutotuneRow:
    x, quantized = probe.input, probe.layers[-1]
    key = signature(layer, x, config, quantized.spec.split)
    if key not in profile:
        profile[key] = measure_layer(layer, x, config, quantized.spec.split)
    seconds, (plain, modulated) = profile[key], probe.errors()
    choice, reason = choose(seconds, (plain, modulated), tolerance, quantized.unsupported)
    backend = "" if quantized.unsupported else ": ".join(execution_of(quantized)).removeprefix("integers on ")
    calls, sizes = probe.calls / probe.clock.tick, 4 * sum(map(sum, probe.sizes.values()))
    return AutotuneRow(probe.name, type(layer).__name__, tuple(x.shape), calls, seconds, (plain, modulated), sizes,
                       choice, reason, backend)  # fmt: skip


def choose(seconds: Seconds, errors: tuple[float, float], tolerance: float, unsupported: str = "") -> tuple[Mode, str]:
    """The fastest mode whose error (plain, modulated) is within the tolerance, and why; floats unless integers pay."""
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
    return f"{layer} reads {tuple(x.shape)} {x.dtype} on {x.device.type}, split at {split}: {config}"


def _measured(config: LayerConfig) -> list[LayerConfig]:
    """Plain and modulated, with scales that are measured at each call: static ones come later, from calibration."""
    if not config.activation.dynamic:
        activation = dataclasses.replace(config.activation, dynamic=True, granularity="tensor", step_groups=1)
        config = dataclasses.replace(config, activation=activation)
    integer = dataclasses.replace(config, execution="integer")
    return [dataclasses.replace(integer, modulation=None, rotation="none"), integer]


def measure_layer(layer: nn.Module, x: Tensor, config: LayerConfig, split: int | None = None) -> Seconds:
    """The best of a few interleaved rounds, on inputs like `x`; images with their channels innermost in memory."""
    clock = Clock("autotune")
    quantized = [modulated_layer(layer, c, "autotune", clock, split) for c in _measured(config)]
    x = innermost(x) if quantized[0].channel_dim == 1 else x
    inputs = itertools.cycle([x, (x * 1.01).to(x.dtype)])  # in turn: the residual is never zero

    def step(run: Callable[[Tensor], Tensor]) -> Tensor:
        clock.call(None)
        return run(next(inputs))

    clock.start()
    runs = {mode: partial(step, run) for mode, run in zip(MODES, (layer, *quantized), strict=True)}
    with torch.no_grad():
        return {mode: min(seconds) for mode, seconds in interleaved(runs, _ROUNDS).items()}


def interleaved(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run in each round, after one that is not counted: a busy machine disturbs all runs alike."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None  # a GPU is handed its work
    for _ in range(rounds):
        for name, run in runs.items():
            wait()
            start = time.perf_counter()
            run()
            wait()
            times[name].append(time.perf_counter() - start)
    return times
