"""A tensor as rows that share a scale: the one shape that the compiled input sides know."""

from __future__ import annotations

from torch import Tensor

from modiff.config import Granularity
from modiff.core.affine import reduced_dims


def scale_shape(x: Tensor, granularity: Granularity, channel_dim: int) -> tuple[int, ...]:
    """Shape of the scales of x: the axes that share one are 1."""
    shared = reduced_dims(x.dim(), granularity, channel_dim)
    return tuple(1 if axis in shared else size for axis, size in enumerate(x.shape))


def as_rows(x: Tensor, granularity: Granularity, channel_dim: int) -> Tensor | None:
    """x as (scales, elements that share one), a view of the same memory; None where its layout has no such view.

    The rows come in the order of the flattened scales. "tensor" and "sample" take both memory layouts of
    convolutions; "token" needs the channels of a token side by side.
    """
    innermost = x.dim() > 2 and x.movedim(1, -1).is_contiguous()
    if not (x.is_contiguous() or innermost) or x.numel() == 0:
        return None
    if granularity == "tensor":
        count = x.numel()
    elif granularity == "sample":
        count = x.numel() // (x.shape[0] if x.dim() > 1 else 1)
    elif granularity == "token":
        last = channel_dim % x.dim() == x.dim() - 1
        if not (x.is_contiguous() if last else channel_dim % x.dim() == 1 and innermost):
            return None
        count = x.shape[channel_dim]
    else:
        return None
    return x.as_strided((x.numel() // count, count), (count, 1))
