"""The range of each layer's residual, a_t - a_{t+1}, over pairs of neighbouring steps (MoDiff, section 1.5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from modiff.calibration.data import Call, calls_with_previous, largest_step
from modiff.calibration.reconstruct.layers import Trainee, evaluating, full_precision
from modiff.core.observers import MinMaxObserver
from modiff.core.quantizer import Quantizer
from modiff.core.step_sets import StepSizes
from modiff.errors import CalibrationError
from modiff.model.attach import required_attachment
from modiff.model.observe import observe
from modiff.nn import ModulatedLayer

Halves = Literal["own", "shared"]


@torch.inference_mode(False)
def measure_residuals(
    model: nn.Module, calls: Sequence[Call], *, halves: Halves = "own", progress: bool = False
) -> None:
    """Set the static scales of modulated layers to cover every residual of the calls, in full precision.

    Symmetric: scale = max|a_t - a_{t+1}| / (2^(b-1) - 1). Else (max - min) / (2^b - 1), with its zero point.

    Args:
        calls: with the call before each; those of a first step have none, and are left out.
        halves: "own" measures the halves of a split input apart; "shared" gives both the range of all of it.
    Raises: CalibrationError if no call holds the one before it, or a layer never ran; scales stay as they were then.
    Cost: two evaluations a call; in memory, the inputs of all layers in one evaluation.
    """
    calls = calls_with_previous("measure_residuals", calls)
    attachment = required_attachment(model, "measure_residuals")
    modulated = {n: q for n, q in attachment.layers.items() if q.config.modulation is not None and q.quantizer}
    trainees = {name: Trainee(layer, "quantized") for name, layer in modulated.items()}
    observers = {name: [MinMaxObserver() for _ in layer.quantizer.segments] for name, layer in modulated.items()}
    with evaluating(model), full_precision(model), torch.no_grad():
        for call in tqdm(calls, desc="residuals", unit="call", disable=not progress):
            before, now = _inputs(model, trainees, call.previous), _inputs(model, trainees, call)
            for name, layer in modulated.items():
                _observe(layer, observers[name], before[name], now[name])
    silent = [name for name, measured in observers.items() if measured[0].minimum is None]
    if silent:
        raise CalibrationError(
            f"{silent[0]}: expected inputs while calibrating, got none. The network never reached it. Exclude the "
            "layer."
        )
    for name, layer in modulated.items():
        _freeze(layer.quantizer, observers[name], halves)
    attachment.step_sizes = StepSizes(largest_step(calls))


def _inputs(model: nn.Module, trainees: Mapping[str, Trainee], call: Call) -> dict[str, list[Tensor]]:
    """What each layer reads in one evaluation, once for each time it is called."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in trainees}

    def keep(name: str, _layer: nn.Module, args: tuple[Tensor, ...], _kwargs: object) -> None:
        inputs[name].append(trainees[name].prepare(args[0].detach()).clone())  # it may be written in place later

    with observe(model, layers=trainees, before_layer=keep):
        call.evaluate(model)
    return inputs


def _observe(layer: ModulatedLayer, observers: list[MinMaxObserver], before: list[Tensor], now: list[Tensor]) -> None:
    if len(before) != len(now):
        raise CalibrationError(
            f"{layer.name}: expected as many calls in both steps, got {len(before)} and {len(now)}. The network "
            "branches on values. Exclude the layer."
        )
    for first, second in zip(before, now, strict=True):
        parts = (second - first).split(list(layer.quantizer.segments), layer.quantizer.channel_dim)
        for observer, part in zip(observers, parts, strict=True):
            observer.observe(part)


def _freeze(quantizer: Quantizer, observers: list[MinMaxObserver], halves: Halves) -> None:
    if halves == "shared":
        for other in observers[1:]:
            observers[0].merge(other)
        observers = [observers[0]] * len(observers)
    c = quantizer.config
    quantizer.static = tuple(o.qparams(quantizer.bits, symmetric=c.symmetric, clip=c.clip) for o in observers)
