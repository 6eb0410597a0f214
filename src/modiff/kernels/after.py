"""The input side of a layer that a norm or an activation feeds, without a pass over memory for either.

    y = activation(norm(x)),   then p_t, s, q_t and â_t of y as in `prologue`

The compiled path computes statistics in one pass (two over each group, in float64) and applies them while it codes.
Norms and exponentials are not torch's bit for bit: y differs by float error, so a code may differ by one where y lies
between two. The law holds all the same, as the state takes what was sent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modiff.config import Granularity
from modiff.errors import KernelError
from modiff.kernels.after_ops import Activation, Norm, code_after, code_after_now


def group_norm_prologue(
    x: Tensor,
    state: Tensor,
    scale: Tensor | None,
    bits: int,
    clip: float = 1.0,
    granularity: Granularity = "sample",
    *,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: Activation = "silu",
) -> tuple[Tensor, Tensor]:
    """Codes of activation(GroupNorm(x)) against its state, which becomes the next one in place.

    Args:
        x: (N, C, ...), in either memory layout; state: the same.
        weight, bias: (C,) or None. The other arguments are those of `prologue`.
    Returns: uint8 codes in the layout of x, and the scales, float32.
    """
    _check(x, state, "group_norm_prologue")
    return _run(x, state, scale, weight, bias, "group", groups, eps, activation, bits, clip, granularity, 1)


def layer_norm_prologue(
    x: Tensor,
    state: Tensor,
    scale: Tensor | None,
    bits: int,
    clip: float = 1.0,
    granularity: Granularity = "token",
    *,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: Activation = "none",
) -> tuple[Tensor, Tensor]:
    """Codes of activation(LayerNorm(x) * weight + bias) against its state, which becomes the next one in place.

    Args:
        x: (B, ..., C). weight, bias: (C,), or (B, C) where each sample is modulated: 1 + scale and shift.
    """
    _check(x, state, "layer_norm_prologue")
    return _run(x, state, scale, weight, bias, "layer", 1, eps, activation, bits, clip, granularity, -1)


def activation_prologue(
    x: Tensor,
    state: Tensor,
    scale: Tensor | None,
    bits: int,
    clip: float = 1.0,
    granularity: Granularity = "token",
    *,
    activation: Activation,
    channel_dim: int = -1,
) -> tuple[Tensor, Tensor]:
    """Codes of activation(x) against its state, which becomes the next one in place."""
    _check(x, state, "activation_prologue")
    return _run(x, state, scale, None, None, "none", 1, 0.0, activation, bits, clip, granularity, channel_dim)


def _run(
    x: Tensor,
    state: Tensor,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: Norm,
    groups: int,
    eps: float,
    activation: Activation,
    bits: int,
    clip: float,
    granularity: Granularity,
    channel_dim: int,
) -> tuple[Tensor, Tensor]:
    x, weight, bias = x.detach(), None if weight is None else weight.detach(), None if bias is None else bias.detach()
    code = code_after if torch.compiler.is_compiling() else code_after_now
    return code(x, state, scale, weight, bias, norm, groups, eps, activation, bits, clip, granularity, channel_dim)


def _check(x: Tensor, state: Tensor, where: str) -> None:
    if x.shape != state.shape:
        raise KernelError(
            f"{where}: expected a state of shape {tuple(x.shape)}, got {tuple(state.shape)}. The state belongs to "
            "another input. Start the trajectory again."
        )
