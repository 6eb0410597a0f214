"""Measure static scales."""

from __future__ import annotations

from collections.abc import Callable
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


def calibrate(model: nn.Module, forward_loop: Callable[[], object], *, observer: ObserverName = "minmax") -> None:
    """Run `forward_loop` with dynamic scales, watch what each layer codes, and freeze the scales.

    Modulated layers are watched on their residuals, plain ones on their inputs: each on exactly what it will code.

    Args:
        forward_loop: runs whole trajectories, for example `lambda: pipe(...)`.
    Raises: CalibrationError if no layer has static scales or a layer never ran; scales measured before are then kept.
    """
    if observer not in OBSERVERS:
        raise ConfigError(f"observer: expected one of {', '.join(OBSERVERS)}, got {observer!r}. Pick one of them.")
    attachment = required_attachment(model, "calibrate")
    coders = {
        n: t.coder for n, t in attachment.twins.items() if t.coder and not t.coder.config.dynamic and t.coder.bits
    }
    if not coders:
        raise CalibrationError(
            "calibrate: expected layers with static scales, got none. Dynamic scales need no calibration. "
            "Set QuantizerConfig(dynamic=False)."
        )
    for coder in coders.values():
        coder.observers = tuple(_observer(coder, observer) for _ in coder.segments)
    try:
        forward_loop()
        silent = [n for n, c in coders.items() if c.observers and c.observers[0].minimum is None]
        if silent:
            raise CalibrationError(
                f"{silent[0]}: expected inputs while calibrating, got none. The forward loop never reached a coded "
                "step of it. Run whole trajectories, or exclude the layer."
            )
        for coder in coders.values():
            coder.freeze()
    finally:
        for coder in coders.values():
            coder.observers = None


def _observer(coder: Coder, name: str) -> Observer:
    return OBSERVERS[name](coder.channel_dim if coder.granularity == "input_channel" else None)
