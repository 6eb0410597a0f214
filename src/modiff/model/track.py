"""Record what networks are given and give back, evaluation by evaluation, in the order of time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Track:
    """samples, outputs: of each evaluation of any of the networks; tensors the size of a latent, kept for all steps."""

    def __init__(self) -> None:
        self.samples: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: the first floating-point tensor with a batch is the sample."""
        given = [
            v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point() and v.dim() > 1
        ]
        self.samples += [given[0].detach().clone()] if given else []

    def after(self, _module: nn.Module, _args: object, output: Any) -> None:
        """Forward hook: the output, or the first of several."""
        tensor = output if isinstance(output, Tensor) else output[0]
        self.outputs.append(tensor.detach().clone())

    def shapes(self) -> list[torch.Size]:
        """Of all samples and outputs: two tracks with the same shapes can be compared."""
        return [t.shape for t in (*self.samples, *self.outputs)]


@contextmanager
def tracked(models: Sequence[nn.Module]) -> Iterator[Track]:
    """Record the evaluations of all of `models` while the body runs."""
    track = Track()
    handles = [m.register_forward_pre_hook(track.before, with_kwargs=True) for m in models]
    handles += [m.register_forward_hook(track.after) for m in models]
    try:
        yield track
    finally:
        for handle in handles:
            handle.remove()
