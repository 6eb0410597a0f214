"""The range of each layer's residual, a_t - a_{t+1}, over pairs of neighbouring steps (MoDiff, section 1.5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from modiff.calibration.data import Call
from modiff.calibration.reconstruct.layers import Trainee, evaluating, full_precision
from modiff.core.observers import MinMaxObserver
from modiff.errors import CalibrationError
from modiff.model.attach import required_attachment
from modiff.model.observe import observe

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
    quantized_layers = required_attachment(model, "measure_residuals").layers
    trainees = {
        n: Trainee(t, "quantized")
        for n, t in quantized_layers.items()
        if t.inputs is not None and t.quantizer is not None
    }
    observers = {
        n: [MinMaxObserver() for _ in t.quantized.quantizer.segments]
        for n, t in trainees.items()
        if t.quantized.quantizer
    }
    pairs = 0
    with evaluating(model), full_precision(model), torch.no_grad():
        for call in tqdm(calls, desc="residuals", unit="call", disable=not progress):
            if call.previous is None:
                continue
            pairs += 1
            before, now = _inputs(model, trainees, call.previous), _inputs(model, trainees, call)
            for name, trainee in trainees.items():
                _observe(trainee, observers[name], before[name], now[name])
    if not pairs:
        raise CalibrationError(
            f"measure_residuals: expected calls with the one before each, got none among {len(calls)}. A residual is "
            "the change between two steps. Collect with pairs=True and two steps or more."
        )
    _freeze(trainees, observers, halves)


def _inputs(model: nn.Module, trainees: Mapping[str, Trainee], call: Call) -> dict[str, list[Tensor]]:
    """What each layer reads in one evaluation, once for each time it is called."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in trainees}

    def keep(name: str, _layer: nn.Module, args: tuple[Tensor, ...], _kwargs: object) -> None:
        inputs[name].append(trainees[name].prepare(args[0].detach()).clone())  # it may be written in place later

    with observe(model, layers=trainees, before_layer=keep):
        call.evaluate(model)
    return inputs


def _observe(trainee: Trainee, observers: list[MinMaxObserver], before: list[Tensor], now: list[Tensor]) -> None:
    quantizer = trainee.quantized.quantizer
    if quantizer is None or len(before) != len(now):
        raise CalibrationError(
            f"{trainee.quantized.name}: expected as many calls in both steps, got {len(before)} and {len(now)}. "
            f"The network "
            "branches on values. Exclude the layer."
        )
    for first, second in zip(before, now, strict=True):
        parts = (second - first).split(list(quantizer.segments), quantizer.channel_dim)
        for observer, part in zip(observers, parts, strict=True):
            observer.observe(part)


def _freeze(trainees: Mapping[str, Trainee], observers: Mapping[str, list[MinMaxObserver]], halves: Halves) -> None:
    silent = [name for name, found in observers.items() if found[0].minimum is None]
    if silent:
        raise CalibrationError(
            f"{silent[0]}: expected inputs while calibrating, got none. The network never reached it. Exclude the "
            "layer."
        )
    for name, trainee in trainees.items():
        quantizer, found = trainee.quantized.quantizer, observers[name]
        if quantizer is None:
            continue
        if halves == "shared":
            for other in found[1:]:
                found[0].merge(other)
            found = [found[0]] * len(found)
        quantizer.static = tuple(
            o.qparams(quantizer.bits, symmetric=quantizer.config.symmetric, clip=quantizer.config.clip) for o in found
        )
