"""How activations are distributed, and how their change from one step to the next is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modiff.evaluate.analysis.watch import Visit

HISTOGRAM_BINS = 255
"""Odd, so that one bin has its middle at zero."""


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
