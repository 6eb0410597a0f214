"""Linear and convolution layers by explicit loops, float64; imports nothing of modiff and calls no torch layer."""

import itertools

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """out[..., o] = sum_i x[..., i] weight[o, i] + bias[o]."""
    out = torch.stack([(x.double() * row).sum(-1) for row in weight.double()], -1)
    return out if bias is None else out + bias.double()


def pad(x: Tensor, dim: int, before: int, after: int, mode: str) -> Tensor:
    size = x.shape[dim]
    positions = list(range(-before, size + after))
    if mode == "reflect":
        source = [-p if p < 0 else 2 * (size - 1) - p if p >= size else p for p in positions]
    elif mode == "replicate":
        source = [min(max(p, 0), size - 1) for p in positions]
    else:  # circular; zeros wraps too and is blanked below
        source = [p % size for p in positions]
    out = x.index_select(dim, torch.tensor(source))
    if mode == "zeros":
        inside = torch.tensor([0 <= p < size for p in positions], dtype=x.dtype)
        out = out * inside.reshape([-1 if d == dim else 1 for d in range(x.dim())])
    return out


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
    groups: int = 1,
    mode: str = "zeros",
) -> Tensor:
    """out[n, o, p] = sum over taps k, channels c of the group: x[n, c, stride p + dilation k] weight[o, c, k] + b."""
    x, weight = x.double(), weight.double()
    kernel = weight.shape[2:]
    for d, taps in enumerate(kernel):
        span = dilation[d] * (taps - 1)
        if padding == "same":
            before, after = span // 2, span - span // 2
        else:
            before = after = 0 if padding == "valid" else int(padding[d])
        x = pad(x, 2 + d, before, after, mode)
    sizes = [(x.shape[2 + d] - dilation[d] * (k - 1) - 1) // stride[d] + 1 for d, k in enumerate(kernel)]
    out = torch.zeros(x.shape[0], weight.shape[0], *sizes, dtype=torch.float64)
    fan_in, fan_out = weight.shape[1], weight.shape[0] // groups
    for taps in itertools.product(*map(range, kernel)):
        spots = tuple(
            slice(t * dilation[d], t * dilation[d] + (sizes[d] - 1) * stride[d] + 1, stride[d])
            for d, t in enumerate(taps)
        )
        window = x[(slice(None), slice(None), *spots)]
        for o, c in itertools.product(range(weight.shape[0]), range(fan_in)):
            out[:, o] += weight[(o, c, *taps)] * window[:, (o // fan_out) * fan_in + c]
    return out if bias is None else out + bias.double().reshape(-1, *[1] * len(kernel))
