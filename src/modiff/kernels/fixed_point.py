"""Input states as 16-bit integers: two bytes an element, exact at any length of trajectory.

The state is n * grid with a power of two `grid` for the layer, and every scale is a multiple of the grid:

    s_t = m_t grid,  m_t = ceil(clip * max|a_t - â_{t+1}| / (qmax grid)),    n_t = n_{t+1} + q_t m_t,    â_t = grid n_t

so the state is the sum of what was sent, with no rounding of its own. A state that is rounded at each step drifts away
from the output state, which only sees the codes. It costs up to one step of the grid in the scale. Multiples stop at
2^14: a residual larger than so many steps of the grid is clipped, and a code that would leave 16 bits is cut, both sent
later as always.

An integer holds no NaN: a NaN, or an infinity, makes the scale of its tensor (sample, token) NaN and with it every
output; the state stays as it is. At the start it makes the grid NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from modiff.config import Granularity
from modiff.core.affine import choose_qparams, qrange
from modiff.errors import KernelError
from modiff.kernels import native
from modiff.kernels.layout import row_shape, scale_shape

_LARGEST = 2**15 - 1
_MOST_MULTIPLE = 2**14
_KINDS = {torch.float32: 0, torch.bfloat16: 1}


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
    granularity: Granularity = "tensor",
    *,
    channel_dim: int = -1,
    clipped: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Code x against its integer state, which becomes the next one in place.

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
    clipped = torch.zeros(1, dtype=torch.int32, device=x.device) if clipped is None else clipped
    codes = torch.empty_like(x, dtype=torch.uint8)
    scale = x.new_empty(scale_shape(x, granularity, channel_dim), dtype=torch.float32)
    if not _natively(x, state, codes, scale, clipped, bits, clip, granularity, channel_dim):
        return fixed_eagerly(x, state, bits, clip, granularity, channel_dim, clipped)
    return codes, scale


def fixed_eagerly(
    x: Tensor,
    state: FixedState,
    bits: int,
    clip: float,
    granularity: Granularity,
    channel_dim: int,
    clipped: Tensor,
) -> tuple[Tensor, Tensor]:
    """The same with torch's operators."""
    qmin, qmax = qrange(bits)
    residual = x.to(torch.float32) - state.value()
    ratio = choose_qparams(residual, bits, granularity, clip=clip, channel_dim=channel_dim).scale / state.grid
    finite = ratio.isfinite()
    multiple = torch.where(finite, ratio.ceil(), 1.0).clamp(1, _MOST_MULTIPLE)
    scale = torch.where(finite, multiple * state.grid, torch.nan)
    held = state.n.to(torch.int32)
    q = torch.round(residual / scale).clamp(qmin, qmax).nan_to_num(0.0).to(torch.int32)
    asked = q
    share = 1 / multiple  # floor(room / multiple) is the whole part of (room + 1/2) / multiple
    q = torch.minimum(q, ((_LARGEST - held + 0.5) * share).to(torch.int32))
    q = torch.maximum(q, -((_LARGEST + 1 + held + 0.5) * share).to(torch.int32))
    clipped.add_((q != asked).sum())
    state.n.copy_(held + q * multiple.to(torch.int32))
    codes = torch.empty_like(x, dtype=torch.uint8)
    return codes.copy_(q - qmin), scale


def _natively(
    x: Tensor,
    state: FixedState,
    codes: Tensor,
    scale: Tensor,
    clipped: Tensor,
    bits: int,
    clip: float,
    granularity: Granularity,
    channel_dim: int,
) -> bool:
    library = native.load().library
    if library is None or x.device.type != "cpu" or x.dtype not in _KINDS:
        return False
    rows = row_shape(x, granularity, channel_dim)
    if rows is None or state.n.stride() != x.stride() or codes.stride() != x.stride():
        return False
    (count, elements), (lowest, highest), block = rows, qrange(bits), native.block(library)
    partial = torch.empty(count * -(-elements // block), dtype=torch.int32, device="cpu") if elements > block else None
    library.modiff_encode_fixed(
        x.data_ptr(), _KINDS[x.dtype], state.n.data_ptr(), state.grid.data_ptr(), codes.data_ptr(), scale.data_ptr(),
        None if partial is None else partial.data_ptr(), clipped.data_ptr(), count, elements, 1, clip / highest, lowest,
        highest, torch.get_num_threads(),
    )  # fmt: skip
    return True
