"""Both sides of one layer over a trajectory, as a layer runs them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from modiff import ModulationConfig, QuantizerConfig
from modiff.core.quantizer import Code, Quantizer
from modiff.core.recursion import State, Update, accumulate, encode

WEIGHT = torch.randn(5, 8, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
BIAS = torch.tensor([3.0, -1.0, 0.5, 10.0, 0.0], dtype=torch.float64)


class Affine:
    """A(x) = x W^T as the recursion sees it, in the dtype it is given."""

    def __init__(self, weight: Tensor = WEIGHT, bias: Tensor = BIAS) -> None:
        self.weight, self.bias = weight, bias

    def anchor(self, value: Tensor) -> Tensor:
        return value @ self.weight.T.to(value.dtype) + self.bias.to(value.dtype)

    def linear(self, code: Code) -> Tensor:
        value = code.value()
        return value @ self.weight.T.to(value.dtype)

    def start(self) -> Tensor:
        return self.bias


class Took(NamedTuple):
    update: Update
    input: State
    output: State


def modulate(
    inputs: Sequence[Tensor],
    activation: QuantizerConfig,
    modulation: ModulationConfig,
    *,
    runs: tuple[int, ...] = (8,),
    granularity: str = "tensor",
    sizes: Sequence[float] | None = None,
    operator: Affine | None = None,
    quantizer: Quantizer | None = None,
) -> list[Took]:
    """Both sides of one layer over a trajectory, as a layer runs them."""
    quantizer = quantizer or Quantizer(activation, granularity, -1, runs)
    operator = operator or Affine()
    a = o = None
    took: list[Took] = []
    for t, x in enumerate(inputs):
        if modulation.reanchor_every and t % modulation.reanchor_every == 0:
            a = None
        ratio = 1.0 if sizes is None or t < 2 else sizes[t] / sizes[t - 1]
        update, a = encode(x, a, quantizer, modulation, ratio)
        o = accumulate(update, o, operator, modulation)
        took.append(Took(update, a, o))
    return took
