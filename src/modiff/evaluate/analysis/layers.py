"""Per layer and step: how far the input ranges, what is left to code, and how far both states are from full precision.

This is the local view: every layer is fed with the inputs that it has in the full-precision network, so what is seen is
the recursion of that layer alone, not errors that it inherits from layers before it or from earlier samples.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from modiff.config import ModulationConfig
from modiff.core.quantizer import Code, Quantizer
from modiff.core.recursion import State, Update, accumulate, compute_dtype, encode, encode_plain, output_of, predict
from modiff.evaluate.analysis.watch import Visit
from modiff.model.roles import ChannelMaxima
from modiff.nn import ModulatedLayer

StepErrors = dict[str, Any]
"""One layer at one step. Ranges in the domain that is coded: rotated, if the config rotates. Norms over the batch.

step; activation_min, _max, _rms; residual_min, _max, _rms, code_error ||r_t - q_t||: None where nothing is coded;
input_error ||a_t - â_t||, output_error ||o_t - ô_t|| against the full-precision o_t; input_relative_l2 and
output_relative_l2: the same over ||a_t|| and ||o_t||.
"""
HISTOGRAM_BINS = 255
"""Odd, so that one bin has its middle at zero."""
LayerTrace = dict[str, Any]
"""A layer through the trajectory: name, kind, setting, steps, and call: 0, or more for a layer that runs several times
in one evaluation."""


class InputStep(NamedTuple):
    """The input side at one step: r_t and q_t, None where the states start; â_t; the update for the output side."""

    residual: Tensor | None
    code: Tensor | None
    state: Tensor
    update: Update


class InputSide:
    """â_t of one tensor, step by step, with what the recursion does not keep: r_t, q_t, and the â_t of the open loop.

    Without compensation the recursion's state holds the raw input, and what the output has received is a_T + Σ q_k:
    that sum is the input state here, so that ô_t = A(â_t) + bias names the same â_t in both loops.
    """

    def __init__(self, quantizer: Quantizer, config: ModulationConfig) -> None:
        self.quantizer, self.config = quantizer, config
        self.state: State | None = None
        self.input_state: Tensor | None = None

    def advance(self, x: Tensor, step: int, ratio: Tensor | float) -> InputStep:
        """One step with the input `x`, already rotated if it is to be."""
        every = self.config.reanchor_every
        before = None if every and step % every == 0 else self.state
        update, self.state = encode(x, before, self.quantizer, self.config, ratio)
        if before is None or self.input_state is None or update.starts:
            self.input_state = self.state.value
            return InputStep(None, None, self.input_state, update)
        x = x.to(compute_dtype(self.config))
        prediction = predict(before, update.weights, x.dtype)
        code = code_value(update.codes, x)
        closed = self.config.error_compensation == "closed_loop"
        self.input_state = self.state.value if closed else self.input_state + code.to(self.input_state.dtype)
        return InputStep(x - prediction, code, self.input_state, update)


def code_value(codes: tuple[Code, ...], like: Tensor) -> Tensor:
    """The sum of what codes stand for; zeros if nothing was sent."""
    return sum((code.value() for code in codes), torch.zeros_like(like))


def coded_domain(layer: ModulatedLayer, x: Tensor) -> Tensor:
    """The tensor that a layer codes: its input in float32 or better, smoothed and rotated if its config says so."""
    return layer.spec.prepared(x if x.dtype == torch.float64 else x.float(), None)


class LayerTraces:
    """Watcher: runs the recursion of each layer on its inputs; memory: one step's states, a few numbers per step."""

    def __init__(self) -> None:
        self._loops: dict[tuple[str, int], _Loop] = {}
        self.maxima = ChannelMaxima()

    def see(self, visit: Visit) -> None:
        """Advance the layer's states by one step and note the errors."""
        self.maxima.see(visit.entry.name, visit.layer, visit.input)
        if visit.key not in self._loops:
            self._loops[visit.key] = _Loop(visit)
        self._loops[visit.key].see(visit)

    def layers(self) -> list[LayerTrace]:
        """All traces, in the order in which the layers first ran."""
        return [loop.trace for loop in self._loops.values()]


class _Loop:
    def __init__(self, visit: Visit) -> None:
        self.layer = layer = visit.modulated(visit.config)
        self.trace: LayerTrace = {
            "name": visit.entry.name, "kind": visit.entry.kind, "call": visit.call, "setting": visit.entry.setting,
            "steps": [],
        }  # fmt: skip
        self.output: State | None = None
        self.inputs: InputSide | None = None
        if layer.quantizer is not None and layer.config.modulation is not None:
            self.inputs = InputSide(layer.quantizer, layer.config.modulation)

    def see(self, visit: Visit) -> None:
        """One step of the layer's recursion, and how far it is from full precision."""
        x = coded_domain(self.layer, visit.input)
        residual, code, state, output = self._advance(x, visit)
        numbers = [x.min(), x.max(), norm(x), norm(x - state), norm(visit.output), norm(visit.output - output)]
        if residual is not None and code is not None:
            numbers += [residual.min(), residual.max(), norm(residual) / x.numel() ** 0.5, norm(residual - code)]
        low, high, a, a_error, o, o_error, *rest = torch.stack([n.double() for n in numbers]).tolist()
        r = rest or [None] * 4
        self.trace["steps"].append({
            "step": visit.step, "activation_min": low, "activation_max": high,
            "activation_rms": a / x.numel() ** 0.5,
            "residual_min": r[0], "residual_max": r[1], "residual_rms": r[2], "code_error": r[3],
            "input_error": a_error, "output_error": o_error,
            "input_relative_l2": a_error / a if a else 0.0, "output_relative_l2": o_error / o if o else 0.0,
        })  # fmt: skip

    def _advance(self, x: Tensor, visit: Visit) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
        """r_t, q_t, â_t, ô_t."""
        operator, quantizer, config = self.layer.operator, self.layer.quantizer, self.layer.config.modulation
        if quantizer is None:  # full-precision activations: only the weight is quantized
            return None, None, x, operator.affine(x)
        if self.inputs is None or config is None:  # plain quantization: all of the input is coded from nothing
            update = encode_plain(x, quantizer)
            code = code_value(update.codes, x)
            return x, code, code, output_of(update, operator)
        now = self.inputs.advance(x, visit.step, visit.ratio)
        self.output = accumulate(now.update, self.output, operator, config)
        return now.residual, now.code, now.state, self.output.value


def trace_name(layer: LayerTrace) -> str:
    """The layer's name, with the call where it runs several times."""
    return layer["name"] + (f" (call {layer['call'] + 1})" if layer["call"] else "")


def norm(x: Tensor) -> Tensor:
    """||x|| over all elements, summed in float64."""
    return torch.linalg.vector_norm(x, dtype=torch.float64)


class Distribution:
    """Watcher: two histograms over all layers; memory is one input per layer and the counts."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, int], Tensor] = {}
        self._counts = torch.zeros(2, HISTOGRAM_BINS, dtype=torch.int64)

    def see(self, visit: Visit) -> None:
        """Count one step; both histograms are in units of the present activation's largest magnitude."""
        x = visit.input.float()
        last = self._last.get(visit.key)
        if last is not None:
            largest = x.abs().max().clamp_min(torch.finfo(x.dtype).tiny)
            self._counts += torch.stack([_histogram(x / largest), _histogram((x - last) / largest)])
        self._last[visit.key] = x.clone()

    def result(self) -> dict[str, Any]:
        """activation, difference: counts per bin over all steps but the first, of a_t and of a_t - a_{t+1}.

        edges: HISTOGRAM_BINS + 1 of them from -1 to 1; the end bins also hold what lies outside.
        """
        activation, difference = self._counts.tolist()
        edges = torch.linspace(-1, 1, HISTOGRAM_BINS + 1, dtype=torch.float64).tolist()
        return {"edges": edges, "activation": activation, "difference": difference}


def _histogram(x: Tensor) -> Tensor:
    bins = ((x + 1) * (HISTOGRAM_BINS / 2)).floor().clamp(0, HISTOGRAM_BINS - 1).long()
    return torch.bincount(bins.flatten(), minlength=HISTOGRAM_BINS).cpu()
