"""Input states as 16-bit integers: two bytes an element, exact at any length of trajectory.

The state is n * grid with a power of two `grid` for the layer, and every scale is a multiple of the grid:

    s_t = m_t grid,  m_t = ceil(clip * max|a_t - â_{t+1}| / (qmax grid)),    n_t = n_{t+1} + q_t m_t,    â_t = grid n_t

so the state is the sum of what was sent, with no rounding of its own. A state that is rounded at each step drifts away
from the output state, which only sees the codes. It costs up to one step of the grid in the scale. Multiples stop at
2^14: a residual larger than 2^14 steps of the grid is clipped, and a code that would leave 16 bits is cut, both sent
later as always.

An integer holds no NaN: a NaN, or an infinity, makes the scale of its tensor (sample, token) NaN and with it every
output; the state stays as it is. At the start it makes the grid NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from modiff.core.affine import choose_qparams
from modiff.kernels.layout import EncodeLayout

_LARGEST = 2**15 - 1
_MOST_MULTIPLE = 2**14


class FixedState(NamedTuple):
    """n (int16, the shape of the input) and grid (float32, no axes, a power of two): the state is n * grid."""

    n: Tensor
    grid: Tensor

    def value(self) -> Tensor:
        """â, float32, exact."""
        return self.n.to(torch.float32) * self.grid


def start(x: Tensor, headroom: float = 2.0) -> FixedState:
    """The state nearest to x, on a grid that leaves room for values `headroom` times as large. No host sync.

    The output state must start from `value()`, not from x: the law is ô = A(â) + bias.
    """
    values = x.detach().to(torch.float32)
    step = values.abs().amax() * (headroom / _LARGEST)
    _, exponent = torch.frexp(step)  # step <= 2^exponent
    exponent = torch.where(step == 0, -100, exponent)  # the first value that is not zero outgrows it, and starts again
    grid = torch.where(step.isfinite(), torch.ldexp(torch.ones_like(step), exponent.clamp(-100, 100)), torch.nan)
    whole = torch.round(values / grid).clamp(-_LARGEST - 1, _LARGEST)
    return FixedState(whole.nan_to_num(0.0).to(torch.int16), grid)


def fixed_eagerly(x: Tensor, state: FixedState, layout: EncodeLayout, clipped: Tensor) -> tuple[Tensor, Tensor]:
    """`encode_residual` against integers, with torch's operators."""
    bits, clip, granularity, channel_dim, *_ = layout
    qmin, qmax = layout.qmin, layout.qmax
    residual = x.to(torch.float32) - state.value()
    ratio = choose_qparams(residual, bits, granularity, clip=clip, channel_dim=channel_dim).scale / state.grid
    finite = ratio.isfinite()
    multiple = torch.where(finite, ratio.ceil(), 1.0).clamp(1, _MOST_MULTIPLE)
    scale = torch.where(finite, multiple * state.grid, torch.nan)
    n = state.n.to(torch.int32)
    rounded = torch.round(residual / scale).clamp(qmin, qmax).nan_to_num(0.0).to(torch.int32)
    share = 1 / multiple  # floor(room / multiple) is the whole part of (room + 1/2) / multiple
    q = torch.minimum(rounded, ((_LARGEST - n + 0.5) * share).to(torch.int32))
    q = torch.maximum(q, -((_LARGEST + 1 + n + 0.5) * share).to(torch.int32))
    clipped.add_((q != rounded).sum())
    state.n.copy_(n + q * multiple.to(torch.int32))
    return (q - qmin).to(torch.uint8), scale
