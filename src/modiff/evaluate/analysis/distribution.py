"""How activations are distributed, and how their change from one step to the next is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modiff.evaluate.analysis.watch import Visit

HISTOGRAM_BINS = 255
"""Odd, so that one bin has its middle at zero."""


Histogram = dict[str, Any]
"""name; activation, difference: counts per bin over all steps but the first, of a_t and of a_t - a_{t+1}."""
DistributionResult = dict[str, Any]
"""edges: HISTOGRAM_BINS + 1 of them from -1 to 1, in units of the layer's largest |a_t| at that step; the end bins also
hold what lies outside. pooled: the histogram of all layers. layers: those of some."""


class Distribution:
    """Watcher: two histograms for each layer; memory is one input per layer and the counts."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, int], Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def see(self, visit: Visit) -> None:
        """Count one step; both histograms are in units of the present activation's largest magnitude."""
        x = visit.input.float()
        last = self._last.get(visit.key)
        if last is not None:
            largest = x.abs().max().clamp_min(torch.finfo(x.dtype).tiny)
            counts = torch.stack([histogram(x / largest), histogram((x - last) / largest)])
            name = visit.entry.name
            self._counts[name] = self._counts.get(name, torch.zeros_like(counts)) + counts
        self._last[visit.key] = x.clone()

    def result(self, panels: int = 3) -> DistributionResult:
        """All layers pooled, and `panels` of them spread evenly over the network's depth."""
        names = list(self._counts)
        chosen = sorted({round(i * (len(names) - 1) / max(1, panels - 1)) for i in range(min(panels, len(names)))})
        pooled = torch.stack(list(self._counts.values())).sum(0)
        return {
            "edges": torch.linspace(-1, 1, HISTOGRAM_BINS + 1, dtype=torch.float64).tolist(),
            "pooled": _histogram("all layers", pooled),
            "layers": [_histogram(names[i], self._counts[names[i]]) for i in chosen],
        }


def histogram(x: Tensor) -> Tensor:
    """Integer counts in HISTOGRAM_BINS bins of [-1, 1]; what lies outside is counted in the end bins."""
    bins = ((x + 1) * (HISTOGRAM_BINS / 2)).floor().clamp(0, HISTOGRAM_BINS - 1).long()
    return torch.bincount(bins.flatten(), minlength=HISTOGRAM_BINS).cpu()


def _histogram(name: str, counts: Tensor) -> Histogram:
    return {"name": name, "activation": counts[0].tolist(), "difference": counts[1].tolist()}
