"""How a layer's input error grows over the steps, with and without compensation, against what theory allows."""

import dataclasses
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from modiff.config import ModulationConfig
from modiff.core.quantizer import Code, Quantizer
from modiff.errors import ConfigError
from modiff.evaluate.analysis.layers import InputSide, coded_domain, norm
from modiff.evaluate.analysis.watch import Visit

LARGEST = 1e300
"""Bounds beyond it are cut here: JSON has no infinity, and nothing is learned from one."""
_ROUNDING = 1e-4
"""The states are float32: an error that the bound meets exactly may lie this share above it."""
Growth = dict[str, Any]
"""steps: from 1. compensated, uncompensated: typical curves, over ||a_t||: error_low, error, error_high (quartiles over
the layers), bound and printed_bound (medians); exceeded, printed_exceeded: share of layers and steps above the bound.

layers: of each name and call; moves ||a_t - a_{t+1}||, norms ||a_t||, and under compensated and uncompensated error
||a_t - â_t||, bound and printed_bound, one value a step. c: the largest ||r - q||² / ||r||² of any step of either loop.
c_theorem: the largest s² d / ||r||² of Thm 4.3, from the scales alone; at 1 or more the theorem promises nothing.
"""


class ErrorGrowth:
    """Watcher: the published recursion (hold predictor, exact first step), closed and open loop, on the input side.

    Only the quantizer is taken from the layer's config: bits, granularity, clip ratio, rotation. Layers without codes
    are passed over. Memory: two input states and the last input of each layer.
    """

    def __init__(self) -> None:
        self._loops: dict[tuple[str, int], _Loops] = {}

    def see(self, visit: Visit) -> None:
        """Advance both loops of the layer by one step."""
        if visit.config.activation.bits is not None:
            if visit.key not in self._loops:
                self._loops[visit.key] = _Loops(visit)
            self._loops[visit.key].see(visit)

    def growth(self) -> Growth:
        """Everything seen. Raises: ConfigError if no layer codes its input."""
        layers = [loops.growth() for loops in self._loops.values()]
        if not layers:
            raise ConfigError(
                "error growth: expected a layer that codes its input, got none. Full-precision activations have no "
                "error to grow. Give the config 2 to 8 activation bits."
            )
        count = min(len(layer["moves"]) for layer in layers)
        spreads = {mode: _spread(layers, mode, count) for mode in ("compensated", "uncompensated")}
        return {"steps": list(range(1, count + 1)), **spreads, "layers": layers}


class _Loops:
    def __init__(self, visit: Visit) -> None:
        self.layer = visit.modulated(dataclasses.replace(visit.config, modulation=ModulationConfig()))
        self.key = visit.key
        quantizer = cast("Quantizer", self.layer.quantizer)
        self.closed = InputSide(quantizer, ModulationConfig())
        self.open = InputSide(quantizer, ModulationConfig(error_compensation="none"))
        self.last: Tensor | None = None
        self.rows: list[list[float]] = []

    def see(self, visit: Visit) -> None:
        """One step of both loops on the layer's own input."""
        x = coded_domain(self.layer, visit.input)
        steps = [side.advance(x, visit.step, 1.0) for side in (self.closed, self.open)]
        if self.last is not None:
            numbers = [norm(x - self.last), norm(x), *(norm(x - step.state) for step in steps)]
            for step in steps:
                if step.residual is not None and step.code is not None:
                    energy = norm(step.residual).square().clamp_min(torch.finfo(torch.float64).tiny)
                    lost = norm(step.residual - step.code).square()
                    numbers += [lost / energy, scale_energy(step.update.codes) / energy]
            self.rows.append(torch.stack([n.double().cpu() for n in numbers]).tolist())
        self.last = x.clone()

    def growth(self) -> dict[str, Any]:
        moves, norms, closed, unclosed, *shares = (list(column) for column in zip(*self.rows, strict=True))
        c, c_theorem = max(shares[0] + shares[2]), max(shares[1] + shares[3])
        return {
            "name": self.key[0], "call": self.key[1], "c": c, "c_theorem": c_theorem, "moves": moves, "norms": norms,
            "compensated": _curve(closed, c, moves, compensated=True),
            "uncompensated": _curve(unclosed, c, moves, compensated=False),
        }  # fmt: skip


def scale_energy(codes: tuple[Code, ...]) -> Tensor:
    """Σ s² over all coded elements: s² d of Thm 4.3, with as many scales as the granularity has."""
    total = torch.zeros((), dtype=torch.float64)
    for code in codes:
        for integers, qparams in code.parts:
            shared = integers.numel() / qparams.scale.numel()
            total = total + qparams.scale.double().square().sum().cpu() * shared
    return total


def uncompensated_bound(c: float, moves: Sequence[float]) -> list[float]:
    """||E_t|| <= sqrt(c) Σ_k ||d_k||: without compensation every step's rounding error stays, so they add up.

    c: the share of the energy that the quantizer loses at most, ||r - q||² <= c ||r||². moves: ||d_k|| from step 1.

    >>> uncompensated_bound(0.25, [1.0, 1.0, 1.0])
    [0.5, 1.0, 1.5]
    """
    return [min(math.sqrt(c) * total, LARGEST) for total in itertools.accumulate(moves)]


def compensated_bound(c: float, moves: Sequence[float]) -> list[float]:
    """||e_t|| <= Σ_k c^{(k-t+1)/2} ||d_k||: with compensation a move of n steps ago has faded by c^{n/2}.

    >>> compensated_bound(0.25, [1.0, 1.0, 1.0])
    [0.5, 0.75, 0.875]
    """
    return _accumulated(moves, lambda error, move: math.sqrt(c) * (move + error))


def printed_bound(c: float, moves: Sequence[float], *, compensated: bool) -> list[float]:
    """The bounds as Thm 4.4 (arXiv:2506.22463) is printed, with the exponents reversed: for comparison only.

    sqrt(Σ_k 2^{T-k-1} c ||d_k||²), and with compensation sqrt(Σ_k (2c)^{T-k-1} ||d_k||²); the proof's own recursion
    gives the exponent k-t+1.
    """
    ratio, factor = (2 * c, 1.0) if compensated else (2.0, c)
    weights = itertools.accumulate(moves, lambda weight, _: min(weight * ratio, LARGEST), initial=factor)
    squares = [weight * move * move for weight, move in zip(weights, moves, strict=False)]
    return [math.sqrt(total) for total in _accumulated(squares, operator.add)]


def _accumulated(values: Sequence[float], step: Callable[[float, float], float]) -> list[float]:
    return list(itertools.accumulate(values, lambda total, value: min(step(total, value), LARGEST), initial=0.0))[1:]


def _curve(error: list[float], c: float, moves: list[float], *, compensated: bool) -> dict[str, list[float]]:
    bound = compensated_bound(c, moves) if compensated else uncompensated_bound(c, moves)
    return {"error": error, "bound": bound, "printed_bound": printed_bound(c, moves, compensated=compensated)}


def _spread(layers: list[dict[str, Any]], mode: str, count: int) -> dict[str, Any]:
    norms = np.array([layer["norms"][:count] for layer in layers]).clip(np.finfo(np.float64).tiny)
    error, bound, printed = (
        np.array([layer[mode][key][:count] for layer in layers]) / norms for key in ("error", "bound", "printed_bound")
    )
    low, middle, high = np.quantile(error, (0.25, 0.5, 0.75), axis=0).tolist()
    exceeded, printed_exceeded = (float(np.mean(error > b * (1 + _ROUNDING))) for b in (bound, printed))
    return {
        "exceeded": exceeded, "printed_exceeded": printed_exceeded,
        "error_low": low, "error": middle, "error_high": high,
        "bound": np.median(bound, axis=0).tolist(), "printed_bound": np.median(printed, axis=0).tolist(),
    }  # fmt: skip
