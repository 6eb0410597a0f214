"""Quantize the residual of a layer's input into codes, and write the next input state, in one or two passes.

    p_t = â_{t+1} [+ g (â_{t+1} - â_{t+2})],   s = clip * max|a_t - p_t| / qmax,   â_t = p_t + s code(a_t - p_t)

Compiled C++ on CPUs, Triton on GPUs, otherwise the core's own functions: equal codes and states, bit for bit. Unlike
the core, all of them write the state in place.

NaN and infinity, as in the core: a NaN, or an infinity under a dynamic scale, makes the scale of its tensor (sample,
token) NaN or infinite, and with it the state and every output: it is seen. Under a static scale a NaN codes to 0 and
leaves the state as it is, and an infinity saturates. Denormal residuals code to 0, as no scale is below 1e-12.

States of 16-bit integers take two bytes an element and are exact at any length of trajectory: â_t = grid n_t with a
power of two `grid` for the layer, and every scale is a multiple of it:

    s_t = m_t grid,   m_t = ceil(clip * max|a_t - â_{t+1}| / (qmax grid)),   n_t = n_{t+1} + q_t m_t

A state that is rounded at each step drifts away from the output state, which only sees the codes. Multiples stop at
2^14: a larger residual is clipped, and a code that would leave 16 bits is cut, both sent later as always. An integer
holds no NaN: there the scale is NaN and the state stays as it is; at the start the grid is NaN.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from modiff.core.affine import SMALLEST_SCALE, QParams, choose_qparams, dequantize, quantize_tensor
from modiff.errors import KernelError
from modiff.kernels import native
from modiff.kernels.dispatch import Choice
from modiff.kernels.layout import EncodeLayout, layout_of
from modiff.kernels.native import KINDS
from modiff.kernels.problem import LARGEST_INT16
from modiff.kernels.triton import backend as gpu

_MOST_MULTIPLE = 2**14
Encoded = tuple[Tensor, Tensor, bool]
"""Codes, their scales, and whether a sample may jump: False where no residual is as large as its value."""


class FixedState(NamedTuple):
    """n (int16, the shape of the input) and grid (float32, no axes, a power of two): the state is n * grid."""

    n: Tensor
    grid: Tensor

    def value(self) -> Tensor:
        """â, float32, exact."""
        return self.n.to(torch.float32).mul_(self.grid)

    def integers(self, x: Tensor) -> Tensor | None:
        """What stands for x on this grid; None where x leaves 16 bits. Waits for the device."""
        whole = torch.round(x.to(torch.float32) / self.grid)
        return whole.to(torch.int16) if bool((whole.abs() <= LARGEST_INT16).all()) else None


def start(x: Tensor, headroom: float = 2.0) -> FixedState:
    """The state nearest to x, on a grid that leaves room for values `headroom` times as large. No host sync.

    The output state must start from `value()`, not from x: the law is ô = A(â) + bias.
    """
    dense = x.is_cpu and x.dtype in KINDS and x.numel() > 0 and torch.ops.aten.is_non_overlapping_and_dense(x)
    if dense and (library := native.load_library("encode").library or native.missing("encode")):
        n, grid = torch.empty_like(x, dtype=torch.int16), torch.empty((), dtype=torch.float32, device="cpu")
        library.modiff_start(x.data_ptr(), KINDS[x.dtype], x.numel(), headroom / LARGEST_INT16, n.data_ptr(),
                             grid.data_ptr(), torch.get_num_threads())  # fmt: skip
        return FixedState(n, grid)
    values = x.detach().to(torch.float32)
    low, high = values.aminmax()
    step = torch.maximum(high, -low) * (headroom / LARGEST_INT16)
    _, exponent = torch.frexp(step)  # step <= 2^exponent
    exponent = torch.where(step == 0, -100, exponent)  # the first value that is not zero outgrows it, and starts again
    grid = torch.where(step.isfinite(), torch.ldexp(torch.ones_like(step), exponent.clamp(-100, 100)), torch.nan)
    whole = (values / grid).round_().clamp_(-LARGEST_INT16 - 1, LARGEST_INT16).nan_to_num_(0.0)
    return FixedState(whole.to(torch.int16), grid)


class Past(NamedTuple):
    """What a step knows of the last one, in the order of the C++ loops; grid and clipped belong to int16 states."""

    state: Tensor | None
    move: Tensor | None
    gain: Tensor | None
    grid: Tensor | None
    clipped: Tensor | None

    def fits(self, strides: tuple[int, ...]) -> bool:
        """Whether the compiled loops know its types, and meet it in memory as they meet the codes."""
        state, move, dtype = self.state, self.move, torch.float32 if self.grid is None else torch.int16
        fits = state is None or (state.dtype == dtype and state.stride() == strides)
        return fits and (move is None or (move.dtype == dtype and move.stride() == strides))


def choose_encoder(device: str = "cpu") -> Choice:
    """What encodes on a device ("native", "triton" or "eager"), and one line that says why."""
    if device == "cuda" and gpu.installed():
        return Choice("triton", "Triton, one pass over rows that fit into a block, otherwise two")
    if device != "cpu":
        return Choice("eager", f"the compiled loop runs on CPUs, the input is on {device}")
    library, reason = native.load_library("encode")
    slow = Choice("eager", f"torch's own operators, several passes over memory: {reason}")
    return slow if library is None else Choice("native", reason)


def encode_residual(
    x: Tensor, state: Tensor | FixedState | None, scale: Tensor | None, bits: int, clip: float = 1.0,
    granularity: str = "tensor", *, channel_dim: int = -1, move: Tensor | None = None, gain: Tensor | None = None,
    clipped: Tensor | None = None,
) -> Encoded:  # fmt: skip
    """Quantize what x differs from its prediction by, and write the next state (and move) in place.

    Args:
        x: a_t, any float dtype; on the compiled path float32 and bfloat16.
        state: â_{t+1}, the shape of x; float32 on the compiled path, or integers. It becomes â_t. None: codes of x.
        scale: given scales, one or as many as the granularity has; None measures them. Integer states take none.
        move, gain: of the "linear" predictor, with a float state; move becomes â_t - â_{t+1}.
        clipped: int32, one element, with an integer state: it counts codes that were cut as the input outgrew the grid
    Returns: uint8 codes in the layout of x, where 2^(bits - 1) stands for zero; the scales, float32; and whether a
    sample may jump, which only measured scales against a state can tell.
    Raises: KernelError for a granularity without integer sums, or arguments that do not fit.
    Cost: 9 bytes of state and codes an element, 5 with integers; x is read once, twice where scales are measured.
    """
    x, past = x.detach(), past_of(x, state, scale, move, gain, clipped)
    if scale is not None and scale.numel() == 1:
        granularity = "tensor"
    layout = layout_of(x.shape, x.stride(), bits, clip, granularity, channel_dim)
    codes, used = torch.empty_like(x, dtype=torch.uint8), scale
    if used is None:
        wide = (x if past.state is None else past.state).dtype == torch.float64
        used = x.new_empty(layout.scales, dtype=torch.float64 if wide else torch.float32)
    fits = layout.rows is not None and layout.rows[0] == used.numel() and used.dtype == torch.float32
    if fits and used.is_contiguous() and codes.stride() == x.stride():
        run = _on_gpu if x.is_cuda or gpu.INTERPRETED else _natively
        jumps = run(layout, x, past, codes, used, dynamic=scale is None)
        if jumps is not None:
            return codes, used, jumps
    value, measured, jumps = encode_eagerly(x, past, scale, layout)
    return codes.copy_(value), measured if scale is None else scale, jumps


def past_of(
    x: Tensor, state: Tensor | FixedState | None, scale: Tensor | None, move: Tensor | None, gain: Tensor | None,
    clipped: Tensor | None,
) -> Past:  # fmt: skip
    """The arguments of `encode_residual` as one, checked."""
    n, grid = (state.n, state.grid) if isinstance(state, FixedState) else (state, None)
    for name, value in (("state", n), ("move", move)):
        if value is not None and value.shape != x.shape:
            raise KernelError(
                f"encode: expected a {name} of shape {tuple(x.shape)}, got {tuple(value.shape)}. The {name} belongs to "
                "another input. Start the trajectory again."
            )
    if scale is move is gain is None and (grid is None) == (clipped is None):  # the usual case
        return Past(n, None, None, grid, clipped)
    past = Past(n, move, None if gain is None else gain.to(torch.float32).contiguous(), grid, clipped)
    fits = clipped is None and (move is None) == (gain is None) if grid is None else clipped is not None
    if not fits or (move is not None and n is None) or (grid is not None and not scale is move is gain is None):
        names = {"scale": scale, **past._asdict()}
        raise KernelError(
            "encode: expected move and gain, both or neither, with a float state, clipped alone with an integer state, "
            "and no more than a scale with no state, got "
            f"{' and '.join(name for name, value in names.items() if value is not None) or 'nothing'}. Each form of "
            "state takes its own arguments. Leave out, or add, what differs."
        )
    return past


def encode_eagerly(x: Tensor, past: Past, scale: Tensor | None, layout: EncodeLayout) -> Encoded:
    """`encode_residual` with the core's functions, one pass over memory for each operation."""
    state, move, gain, grid, clipped = past
    if state is not None and grid is not None and clipped is not None:
        fixed = FixedState(state, grid)
        codes, used = _fixed_eagerly(x, fixed, layout, clipped)
        return codes, used, _may_jump(used, fixed.value(), grid, layout)
    exact = torch.float64 if (x if state is None else state).dtype == torch.float64 else torch.float32
    residual = x = x.to(exact)
    predicted = old = x if state is None else state.to(exact)
    if state is not None:
        if move is not None and gain is not None:
            predicted = old + gain * move.to(exact)  # p_t = â_{t+1} [+ g (â_{t+1} - â_{t+2})]
        residual = x - predicted
    bits, clip, granularity, channel_dim, *_ = layout
    if scale is None:
        qparams = choose_qparams(residual, bits, granularity, clip=clip, channel_dim=channel_dim)
    else:
        qparams = QParams(scale.to(exact), None)
    codes, jumps = quantize_tensor(residual, qparams, bits), False
    if state is not None:
        value = predicted + dequantize(codes, qparams)  # â_t = p_t + q_t
        if move is not None:
            move.copy_(value - old)
        state.copy_(value)
        jumps = scale is None and _may_jump(qparams.scale, value, SMALLEST_SCALE, layout)
    return (codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8), qparams.scale, jumps


def _may_jump(scale: Tensor, state: Tensor, smallest: Tensor | float, layout: EncodeLayout) -> bool:
    """Whether a residual may need larger scales than its value; the state is `unsent` of the range away from it.

    smallest: no value needs a smaller scale. On a device nothing is waited for, and it may always be.
    """
    own = choose_qparams(state, layout.bits, layout.granularity, clip=layout.clip, channel_dim=layout.channel_dim)
    larger = ((1.001 + layout.unsent) * scale >= own.scale) & (scale > smallest)
    return not scale.is_cpu or bool(larger.any())


def _natively(
    layout: EncodeLayout, x: Tensor, past: Past, codes: Tensor, scale: Tensor, *, dynamic: bool
) -> bool | None:
    if layout.rows is None or x.dtype not in KINDS or not x.is_cpu or not past.fits(codes.stride()):
        return None
    if (library := native.load_library("encode").library or native.missing("encode")) is None:
        return None
    partial = torch.empty(layout.blocks, dtype=torch.int32, device="cpu") if dynamic and layout.blocks else None
    jumps = library.modiff_encode(
        x.data_ptr(), KINDS[x.dtype], *[None if t is None else t.data_ptr() for t in past], codes.data_ptr(),
        scale.data_ptr(), None if partial is None else partial.data_ptr(), *layout.rows, layout.scales[0],
        int(dynamic), layout.factor, layout.unsent, layout.qmin, layout.qmax, torch.get_num_threads(),
    )  # fmt: skip
    return bool(jumps)


def _on_gpu(layout: EncodeLayout, x: Tensor, past: Past, codes: Tensor, scale: Tensor, *, dynamic: bool) -> bool | None:
    state = past.state
    known = state is None or (state.dtype in gpu.STATES and state.stride() == codes.stride())
    if layout.rows is None or past.move is not None or not known or not gpu.installed():
        return None
    rows, states, sent = (
        None if t is None else t.as_strided(layout.rows, (layout.rows[1], 1)) for t in (x, state, codes)
    )
    from modiff.kernels.triton.loops import code_rows

    with gpu.on_device_of(x):
        code_rows(rows, states, sent, scale.view(-1), layout.bits, layout.clip, dynamic=dynamic)
    return dynamic and state is not None  # nothing is waited for


def _fixed_eagerly(x: Tensor, state: FixedState, layout: EncodeLayout, clipped: Tensor) -> tuple[Tensor, Tensor]:
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
    q = torch.minimum(rounded, ((LARGEST_INT16 - n + 0.5) * share).to(torch.int32))
    q = torch.maximum(q, -((LARGEST_INT16 + 1 + n + 0.5) * share).to(torch.int32))
    clipped.add_((q != rounded).sum())
    state.n.copy_(n + q * multiple.to(torch.int32))
    return (q - qmin).to(torch.uint8), scale
