"""How long does a layer take in floats, plain and modulated? Measured on this machine, once for each kind of layer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from modiff.config import LayerConfig
from modiff.errors import ConfigError, FormatError
from modiff.files import check_writable, write_json
from modiff.kernels.isa import machine
from modiff.kernels.roofline import Reached, interleaved, measure_peaks
from modiff.nn import Clock, ModulatedLayer, quantized_class
from modiff.nn.byte_code import innermost

Mode = Literal["float", "plain", "modulated"]
Seconds = dict[str, float]
"""Of one call in each mode."""
MODES: tuple[Mode, ...] = ("float", "plain", "modulated")
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
    x = innermost(x) if kind is not None and kind.channel_dim == 1 else x
    near = [x, (x * 1.01).to(x.dtype)]  # two inputs in turn: the residual is never zero
    runs = {"float": _alternating(layer, near)}
    for name, chosen in (("plain", plain(config)), ("modulated", modulated(config))):
        runs[name] = _alternating(_twin(layer, chosen, split), near)
    with torch.no_grad():
        return {name: min(found) for name, found in interleaved(runs, _ROUNDS).items()}


def _twin(layer: nn.Module, config: LayerConfig, split: int | None) -> Callable[[Tensor], Tensor]:
    """A modulated layer alone in its model, as a function."""
    kind = quantized_class(layer)
    if kind is None:
        raise ConfigError(
            f"autotune: expected a layer with a modulated quantized, got {type(layer).__name__}. Exclude it."
        )
    quantized: ModulatedLayer = kind.from_float(layer, measurable(config), clock=Clock("gate"), split=split)
    quantized.clock.start()

    def run(x: Tensor) -> Tensor:
        quantized.clock.call(None)
        output = quantized(x)
        quantized.clock.returned()
        return output

    return run


def _alternating(run: Callable[[Tensor], Tensor], inputs: list[Tensor]) -> Callable[[], Tensor]:
    turn = 0

    def call() -> Tensor:
        nonlocal turn
        turn += 1
        return run(inputs[turn % len(inputs)])

    run(inputs[0])  # a modulated layer starts its states: the steps after are the ones that count
    return call
