"""The range of each layer's residual, a_t - a_{t+1}, over pairs of neighbouring steps (MoDiff, section 1.5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from modiff.calibration.data import Call, calls_with_previous, largest_step
from modiff.calibration.reconstruct.layers import Trainee, evaluating, full_precision
from modiff.core.step_sets import StepSizes
from modiff.errors import CalibrationError
from modiff.model.attach import required_attachment
from modiff.model.calibrate import measure_scales
from modiff.model.observe import observe


@torch.inference_mode(False)
def measure_residuals(model: nn.Module, calls: Sequence[Call], *, progress: bool = False) -> None:
    """Set the static scales of modulated layers to max|a_t - a_{t+1}| / qmax over the calls, in full precision.

    Calls of a first step have no residual, and are left out.
    Raises: CalibrationError if no call holds the one before it, or a layer never ran; scales stay as they were then.
    Cost: two evaluations a call; in memory, the inputs of all layers in two evaluations.
    """
    calls = calls_with_previous("measure_residuals", calls)
    layers = required_attachment(model, "measure_residuals").layers
    quantizers = {name: layer.quantizer for name, layer in layers.items() if layer.quantizer is not None}
    trainees = {name: Trainee(layers[name], "quantized") for name in quantizers}

    def show() -> None:
        with evaluating(model), full_precision(model), torch.no_grad():
            for call in tqdm(calls, desc="residuals", unit="call", disable=not progress):
                before, now = (_inputs(model, trainees, c) for c in (call.previous, call) if c is not None)
                for name, quantizer in quantizers.items():
                    if len(before[name]) != len(now[name]):
                        raise CalibrationError(
                            f"{name}: expected as many calls in both steps, got {len(before[name])} and "
                            f"{len(now[name])}. The network branches on values. Exclude the layer."
                        )
                    for first, second in zip(before[name], now[name], strict=True):
                        quantizer(second - first)

    measure_scales(model, show)
    required_attachment(model, "measure_residuals").step_sizes = StepSizes(largest_step(calls))


def _inputs(model: nn.Module, trainees: Mapping[str, Trainee], call: Call) -> dict[str, list[Tensor]]:
    """What each layer reads in one evaluation, once for each time it is called."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in trainees}

    def keep(name: str, _layer: nn.Module, args: tuple[Tensor, ...], _kwargs: object) -> None:
        inputs[name].append(trainees[name].prepare(args[0].detach()).clone())  # it may be written in place later

    with observe(model, layers=trainees, before_layer=keep):
        call.evaluate(model)
    return inputs
