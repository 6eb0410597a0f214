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
from modiff.errors import KernelError
from modiff.kernels import native
from modiff.kernels.encode import EncodeLayout, layout_of
from modiff.kernels.native import KINDS

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


def encode_fixed(
    x: Tensor,
    state: FixedState,
    bits: int,
    clip: float = 1.0,
    granularity: str = "tensor",
    *,
    channel_dim: int = -1,
    clipped: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Encode x against its integer state, which becomes the next one in place.

    Args:
        clipped: int32, one element, to which the number of codes that were cut is added: the input outgrew its grid,
            and only a new start brings it back into reach.
    Returns: uint8 codes in the layout of x, where 2^(bits - 1) stands for zero, and scales, float32.
    Cost: 5 bytes of state and codes an element (9 with a float32 state), x read twice.
    """
    if state.n.shape != x.shape or state.n.dtype != torch.int16:
        raise KernelError(
            f"encode_fixed: expected an int16 state of shape {tuple(x.shape)}, got {state.n.dtype} of "
            f"{tuple(state.n.shape)}. The state belongs to another input. Start the trajectory again."
        )
    x = x.detach()
    layout = layout_of(x.shape, x.stride(), bits, clip, granularity, channel_dim)
    clipped = torch.zeros(1, dtype=torch.int32, device=x.device) if clipped is None else clipped
    codes = torch.empty_like(x, dtype=torch.uint8)
    known = x.is_cpu and x.dtype in KINDS and state.n.stride() == x.stride() == codes.stride()
    if (
        layout.rows is None
        or not known
        or (library := native.load_library("encode").library or native.missing("encode")) is None
    ):
        return fixed_eagerly(x, state, layout, clipped)
    scale = x.new_empty(layout.scales, dtype=torch.float32)
    partial = torch.empty(layout.blocks, dtype=torch.int32, device="cpu")
    library.modiff_encode_fixed(
        x.data_ptr(), KINDS[x.dtype], state.n.data_ptr(), state.grid.data_ptr(), codes.data_ptr(), scale.data_ptr(),
        partial.data_ptr(), clipped.data_ptr(), *layout.rows, 1, layout.factor, layout.qmin, layout.qmax,
        torch.get_num_threads(),
    )  # fmt: skip
    return codes, scale


def fixed_eagerly(x: Tensor, state: FixedState, layout: EncodeLayout, clipped: Tensor) -> tuple[Tensor, Tensor]:
    """The same with torch's operators."""
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
    codes = torch.empty_like(x, dtype=torch.uint8)
    return codes.copy_(q - qmin), scale
