"""Granularities: which elements of a tensor share one scale, and so which shape its scales have.

"tensor"         one scale                       (1, 1, ...)
"sample"         one for each of a batch         (N, 1, ...)
"token"          one for each token or pixel     all but the channels
"input_channel"  one for each channel            along the summed axis: no integer matmul can run it
"""

from collections.abc import Callable

import torch
from torch import Tensor

from modiff.config import GRANULARITIES
from modiff.errors import ConfigError

Extreme = Callable[..., Tensor]  # torch.amin or torch.amax


class Granularity:
    """A rule that says what shares a scale; a subclass gives `reduced_dims`, or `reduce` where axes are not enough.

    static: whether `modiff.calibrate` can measure its scales before; False where they belong to one input.
    per_channel: a static scale for each channel; otherwise one.
    """

    static = False
    per_channel = False

    def reduced_dims(self, dims: int, channel_dim: int) -> tuple[int, ...]:
        """The axes of a tensor of `dims` axes that share one scale."""
        raise NotImplementedError

    def reduce(self, x: Tensor, channel_dim: int, extreme: Extreme) -> Tensor:
        """The extremes of x over what shares a scale, broadcastable to x: the shape of its scales."""
        dims = self.reduced_dims(x.dim(), channel_dim)
        return extreme(x, dims, keepdim=True) if dims else x  # torch's amin over no axes would reduce all

    def unsupported(self, kernel_size: tuple[int, ...] = (), stride: tuple[int, ...] = ()) -> str:
        """Why integer kernels cannot run it in a layer; empty if they can. What they do not know they refuse."""
        return "no kernel knows its granularity"


class _Sample(Granularity):
    def reduced_dims(self, dims: int, channel_dim: int) -> tuple[int, ...]:
        return tuple(range(1, dims)) if dims > 1 else (0,)

    def unsupported(self, kernel_size: tuple[int, ...] = (), stride: tuple[int, ...] = ()) -> str:
        return ""


class _Tensor(_Sample):
    static = True

    def reduced_dims(self, dims: int, channel_dim: int) -> tuple[int, ...]:
        return tuple(range(dims))


class _Token(Granularity):
    def reduced_dims(self, dims: int, channel_dim: int) -> tuple[int, ...]:
        return (channel_dim % dims,)

    def unsupported(self, kernel_size: tuple[int, ...] = (), stride: tuple[int, ...] = ()) -> str:
        over = {*kernel_size, *stride} - {1}
        return "a scale for each pixel has no integer sums over several pixels" if over else ""


class _InputChannel(Granularity):
    static = per_channel = True

    def reduced_dims(self, dims: int, channel_dim: int) -> tuple[int, ...]:
        return tuple(d for d in range(dims) if d != channel_dim % dims)

    def unsupported(self, kernel_size: tuple[int, ...] = (), stride: tuple[int, ...] = ()) -> str:
        return "a scale along the summed axis has no integer sums"


class _Named(dict[str, Granularity]):
    """By name. Looked up at every step: by subscription, as torch.compile warns of a cached function."""

    def __missing__(self, name: str) -> Granularity:
        raise ConfigError(f"granularity: expected one of {', '.join(self)}, got {name!r}. Only a layer can "
                          "resolve 'auto'. Name one of them, or register it first.")  # fmt: skip


BY_NAME = _Named(tensor=_Tensor(), sample=_Sample(), token=_Token(), input_channel=_InputChannel())


def register_granularity(name: str, granularity: Granularity) -> None:
    """Let `QuantizerConfig(granularity=name)` mean `granularity`, in this process; layers that use it are simulated.

    Raises: ConfigError if the name is taken.
    """
    if name in GRANULARITIES:
        raise ConfigError(f"register_granularity: expected a new name, got {name!r}. Configs that say {name!r} mean "
                          "another granularity. Choose another name.")  # fmt: skip
    BY_NAME[name] = granularity
    GRANULARITIES.append(name)


def granularity_named(name: str) -> Granularity:
    """The granularity that a config names. Raises: ConfigError for "auto", and where the name is not registered."""
    return BY_NAME[name]


def resolve(name: str, channel_dim: int) -> str:
    """What "auto" means in a layer with this axis of channels: a scale per token if it is the last, else per sample."""
    if name != "auto":
        return name
    return "token" if channel_dim == -1 else "sample"


def extremes(x: Tensor, granularity: Granularity, channel_dim: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest values over what shares a scale, broadcastable to x."""
    return granularity.reduce(x, channel_dim, torch.amin), granularity.reduce(x, channel_dim, torch.amax)


def positions(x: Tensor, channel_dim: int) -> list[int]:
    """The axes of tokens or pixels: all but the first, that of channels, and those of size 1."""
    return [axis for axis in range(1, x.dim()) if axis != channel_dim % x.dim() and x.shape[axis] > 1]
