"""Layers of every kind on drifting inputs, and a group of layers that share one residual."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from modiff import LayerConfig, ModulationConfig, QuantizerConfig
from modiff.nn import Clock, ModulatedLayer, quantized_class
from tests.helpers import assert_same_bits, assert_within, drifting
from tests.recipes import randomised

W8A4 = LayerConfig(activation=QuantizerConfig(bits=4))
INT16 = LayerConfig(modulation=ModulationConfig(state_dtype="int16", anchor_weights="quantized"), execution="integer")
TIMES = [900.0, 700.0, 600.0, 500.0, 450.0]
LAYERS = {
    "linear": (lambda: nn.Linear(16, 6), (2, 5, 16), None),
    "linear of odd channels": (lambda: nn.Linear(7, 3, bias=False), (4, 7), None),
    "conv": (lambda: nn.Conv2d(8, 4, 3, padding=1), (2, 8, 5, 6), None),
    "conv with a stride": (lambda: nn.Conv2d(6, 4, 3, stride=2, padding=(0, 1), dilation=(1, 2)), (2, 6, 7, 9), None),
    "conv in groups": (lambda: nn.Conv2d(8, 6, 3, groups=2, padding="same"), (1, 8, 4, 4), None),
    "conv of one pixel": (lambda: nn.Conv2d(8, 5, 1), (3, 8, 4, 4), None),
    "conv along one axis": (lambda: nn.Conv1d(8, 5, 3, padding=2), (2, 8, 9), None),
    "conv along three axes": (lambda: nn.Conv3d(4, 3, 3, padding=1), (1, 4, 3, 4, 4), None),
    "split conv": (lambda: nn.Conv2d(8, 4, 3, padding=1), (2, 8, 4, 4), 5),
    "split linear": (lambda: nn.Linear(12, 4), (2, 3, 12), 4),
}
"""What makes it, the shape of its input, where it is split."""


def integer(config: LayerConfig) -> LayerConfig:
    return dataclasses.replace(config, execution="integer")


def walk(shape: tuple[int, ...], steps: int = 5, dtype: torch.dtype = torch.float32, seed: int = 3) -> list[Tensor]:
    return drifting(seed, shape, steps, 0.3, dtype)


def output_bound(layer: nn.Module, x: Tensor, steps: int) -> float:
    """Float error of sums over the fan-in, of `steps` steps: generous, and far below one code."""
    fan_in = layer.weight[0].numel()
    return 2e-6 * steps * float(x.abs().max()) * float(layer.weight.detach().abs().max()) * fan_in


def same_bits(ours, theirs) -> None:
    """All tensors of all steps, as `play` gives them."""
    for mine, expected in zip(ours, theirs, strict=True):
        for a, b in zip(mine, expected, strict=True):
            assert_same_bits(a, b)


def drawn(name: str, steps: int = 5, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[Tensor], int | None]:
    """A layer of `LAYERS`, its inputs, where it is split."""
    make, shape, split = LAYERS[name]
    return randomised(make()).to(dtype), walk(shape, steps, dtype), split


def follows(ours, theirs, bound: float) -> None:
    """Input states bit for bit, outputs and their states within `bound`, in all steps as `play` gives them."""
    for (output, state, output_state), (expected, expected_state, expected_output) in zip(ours, theirs, strict=True):
        assert_same_bits(state, expected_state)
        assert (output.dtype, output_state.dtype) == (expected.dtype, expected_output.dtype)
        assert_within(output_state, expected_output, bound)
        assert_within(output, expected, bound)


def group_of(size: int, *, shared: bool, config: LayerConfig = W8A4) -> tuple[Clock, list[ModulatedLayer]]:
    """to_q, to_k and to_v on one clock; with one residual where they share."""
    clock = Clock("model")
    floats = [randomised(nn.Linear(8, 3), seed) for seed in range(size)]
    layers = [
        quantized_class(f).from_float(f, config, name=f"to_{'qkv'[i]}", clock=clock) for i, f in enumerate(floats)
    ]
    for layer in layers[1:] if shared else ():
        layer.share_with(layers[0])
    return clock, layers


def step(clock: Clock, layers: list[ModulatedLayer], *inputs: Tensor) -> list[Tensor]:
    """One evaluation; one input for all layers, or one for each."""
    clock.call(None)
    try:
        return [layer(x) for layer, x in zip(layers, inputs if len(inputs) > 1 else inputs * len(layers), strict=True)]
    finally:
        clock.returned()
