"""Layers and the clock as torch.compile sees them: one operator each, so that a model is one graph at every step.

    modiff::begin    an evaluation of the network begins: the clock moves on
    modiff::layer    a layer's forward, states and all
    modiff::end      the evaluation ended

What a layer remembers stays outside of the graph: no step, state or first use is a reason to compile again. Codes are
those of eager execution for the same inputs. All three write into the clock's `token`, which keeps their order.

They run Python at every call, so no CUDA graph may hold them. The tag says so to torch.compile(mode="reduce-overhead"),
which would record the first steps of a trajectory and repeat them for ever.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

from modiff.kernels.geometry import empty_output
from modiff.nn.byte_code import innermost

_TAGS = (torch.Tag.cudagraph_unsafe,)
_NUMBERS = itertools.count()
_HOLDERS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def number_for(holder: object) -> int:
    """A number that a graph can hold for a layer or a clock, for as long as it lives."""
    number = next(_NUMBERS)
    _HOLDERS[number] = holder
    return number


@torch.library.custom_op("modiff::begin", mutates_args=("token",), tags=_TAGS)
def begin(token: Tensor, timestep: Tensor | None, number: int) -> None:
    """The attachment of `number` hears that an evaluation begins."""
    _HOLDERS[number].begin(timestep)


@begin.register_fake
def _(token: Tensor, timestep: Tensor | None, number: int) -> None:
    return None


@torch.library.custom_op("modiff::end", mutates_args=("token",), tags=_TAGS)
def end(token: Tensor, number: int) -> None:
    """The attachment of `number` hears that the evaluation ended."""
    _HOLDERS[number].end()


@end.register_fake
def _(token: Tensor, number: int) -> None:
    return None


@torch.library.custom_op("modiff::layer", mutates_args=("token",), tags=_TAGS)
def layer(token: Tensor, x: Tensor, number: int) -> Tensor:
    """The forward of the layer of `number`, channels innermost in memory."""
    holder = _HOLDERS[number]
    output = holder.run(x)
    return output.contiguous() if holder.channel_dim == -1 else innermost(output)


@layer.register_fake
def _(token: Tensor, x: Tensor, number: int) -> Tensor:
    holder = _HOLDERS[number]
    shape = holder.operator(x, x.new_empty(holder.weight_shape), None).shape
    return empty_output(x, shape, 0 if holder.channel_dim == -1 else x.dim() - 2, x.dtype)
