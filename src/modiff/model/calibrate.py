"""Measure static scales."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from torch import nn

from modiff.core.coder import Coder
from modiff.core.observers import MinMaxObserver, MovingAverageObserver, MSEObserver, Observer, PercentileObserver
from modiff.errors import CalibrationError, ConfigError
from modiff.model.attachment import required_attachment

OBSERVERS: dict[str, type[Observer]] = {
    "minmax": MinMaxObserver,
    "moving_average": MovingAverageObserver,
    "percentile": PercentileObserver,
    "mse": MSEObserver,
}
ObserverName = Literal["minmax", "moving_average", "percentile", "mse"]


def calibrate(
    models: nn.Module | Sequence[nn.Module], forward_loop: Callable[[], object], *, observer: ObserverName = "minmax"
) -> None:
    """Run `forward_loop` with dynamic scales, watch what each layer codes, and freeze the scales.

    Modulated layers are watched on their residuals, plain ones on their inputs: each on exactly what it will code.

    Args:
        models: one model, or all that `forward_loop` runs: they are watched in one go.
        forward_loop: runs whole trajectories, for example `lambda: pipe(...)`.
    Raises: CalibrationError if no layer has static scales or a layer never ran; scales measured before are then kept.
    """
    if observer not in OBSERVERS:
        raise ConfigError(f"observer: expected one of {', '.join(OBSERVERS)}, got {observer!r}. Pick one of them.")
    coders: list[tuple[str, Coder]] = []
    for model in (models,) if isinstance(models, nn.Module) else models:
        coders += _static_coders(model)
    if not coders:
        raise CalibrationError(
            "calibrate: expected layers with static scales, got none. Dynamic scales need no calibration. "
            "Set QuantizerConfig(dynamic=False)."
        )
    for _, coder in coders:
        coder.observers = tuple(_observer(coder, observer) for _ in coder.segments)
    try:
        forward_loop()
        silent = [n for n, c in coders if c.observers and c.observers[0].minimum is None]
        if silent:
            raise CalibrationError(
                f"{silent[0]}: expected inputs while calibrating, got none. The forward loop never reached a coded "
                "step of it. Run whole trajectories, or exclude the layer."
            )
        for _, coder in coders:
            coder.freeze()
    finally:
        for _, coder in coders:
            coder.observers = None


def _static_coders(model: nn.Module) -> list[tuple[str, Coder]]:
    """The coders that need scales, with the names of their layers."""
    twins = required_attachment(model, "calibrate").twins
    coders = [(name, twin.coder) for name, twin in twins.items()]
    return [(name, coder) for name, coder in coders if coder and not coder.config.dynamic and coder.bits]


def _observer(coder: Coder, name: str) -> Observer:
    return OBSERVERS[name](coder.channel_dim if coder.granularity == "input_channel" else None)
