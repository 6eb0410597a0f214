"""How far quantized values are from the values: L1, mean |x - Q(x)|^p, cosine and Kullback-Leibler (PTQ4DM, 3.4).

Each takes rows (R, N) with scales (R, 1) and gives one loss (R, 1) for each row; less is better. A range search tries
smaller and smaller ranges and keeps the one with the least loss. PTQ4DM found MSE with p = 2.4 the best of the four.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from modiff.core.affine import QParams, fake_quantize, quantize

RangeMetric = Callable[[Tensor, QParams, int], Tensor]
"""(rows (R, N), scales (R, 1), bits) -> losses (R, 1)."""

BINS = 2048
"""Bins of the histogram that the Kullback-Leibler metric compares."""


def l1(rows: Tensor, qparams: QParams, bits: int) -> Tensor:
    """mean |x - Q(x)|."""
    return power(rows, qparams, bits, 1.0)


def power(rows: Tensor, qparams: QParams, bits: int, p: float = 2.4) -> Tensor:
    """mean |x - Q(x)|^p."""
    error = (rows - fake_quantize(rows, qparams, bits)).abs()
    return (error if p == 1.0 else error.pow(p)).mean(1, keepdim=True)


def cosine(rows: Tensor, qparams: QParams, bits: int) -> Tensor:
    """1 - <x, Q(x)> / (||x|| ||Q(x)||); 1 where one of them is zero."""
    value = fake_quantize(rows, qparams, bits)
    product = (rows * value).sum(1, keepdim=True)
    norms = rows.norm(dim=1, keepdim=True) * value.norm(dim=1, keepdim=True)
    return 1 - product / norms.clamp_min(torch.finfo(norms.dtype).tiny)


def kullback_leibler(rows: Tensor, qparams: QParams, bits: int) -> Tensor:
    """KL(P || P'), P: histogram of x over its whole range; P': the same with each code's mass spread over its bins.

    P' is what the codes still tell of P: bins of one code share their mean, over bins that are not empty. Values that
    saturate share a code, so a range that cuts a tail with structure loses it.
    """
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    width = ((high - low) / BINS).clamp_min(torch.finfo(rows.dtype).tiny)
    bins = ((rows - low) / width).long().clamp(0, BINS - 1)
    mass = torch.zeros(len(rows), BINS, dtype=torch.float64, device=rows.device)
    mass.scatter_add_(1, bins, torch.ones_like(bins, dtype=torch.float64))
    mass = mass / rows.shape[1]
    centres = low + (torch.arange(BINS, device=rows.device) + 0.5) * width
    codes = quantize(centres, qparams, bits).long() + 2 ** (bits - 1)  # from 0
    filled = (mass > 0).double()
    per_code = torch.zeros(len(rows), 2**bits, dtype=torch.float64, device=rows.device)
    shared = per_code.scatter_add(1, codes, mass) / per_code.scatter_add(1, codes, filled).clamp_min(1)
    spread = shared.gather(1, codes)
    terms = torch.where(mass > 0, mass * (mass / spread.clamp_min(1e-300)).log(), torch.zeros_like(mass))
    return terms.sum(1, keepdim=True).to(rows.dtype)


RANGE_METRICS: dict[str, RangeMetric] = {"l1": l1, "mse": power, "cosine": cosine, "kl": kullback_leibler}
