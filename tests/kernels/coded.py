"""What the input side behind a norm must give, up to the float error of the norm."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from tests.helpers import assert_within

ACTIVATIONS = ("none", "silu", "gelu_tanh", "gelu")


def active(y: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return functional.silu(y)
    approximate = {"gelu_tanh": "tanh", "gelu": "none"}.get(activation)
    return y if approximate is None else functional.gelu(y, approximate=approximate)


def check(
    found: tuple[Tensor, Tensor], before: Tensor, after: Tensor, exact: Tensor, bits: int, axes: tuple[int, ...]
) -> None:
    """The scale, the codes and the state are those of `exact`, up to the float error of a norm."""
    codes, scale = found
    error = 4e-6 * (1 + exact.abs().max())
    residual = exact - before.double()
    largest = residual.abs().amax(axes, keepdim=True) / (2 ** (bits - 1) - 1)
    assert_within(scale, largest.reshape(scale.shape), 1e-5 * float(largest.max()) + error)
    whole = codes.double() - 2 ** (bits - 1)
    step = scale.double().reshape(largest.shape)
    assert_within(after, before.double() + whole * step, 1e-6 * (1 + exact.abs().max()))
    assert_within(after, exact, (0.5001 * step + error).expand_as(exact))
