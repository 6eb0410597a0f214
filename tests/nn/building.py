"""Layers of every kind on drifting inputs, groups that share a residual, networks whose graphs are rewritten."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import modiff
from modiff import LayerConfig, ModiffConfig, ModulationConfig, QuantizerConfig
from modiff.nn import Clock, ModulatedLayer, fusion, quantized_class
from tests.helpers import assert_same_bits, assert_within, drifting
from tests.recipes import randomised

W8A4 = LayerConfig(activation=QuantizerConfig(bits=4))
INT16 = LayerConfig(modulation=ModulationConfig(anchor_weights="quantized"), execution="integer")
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
    """On integers with the states of the simulation: float32 where the config does not say."""
    modulation = config.modulation
    if modulation is not None and modulation.state_dtype == "auto":
        modulation = dataclasses.replace(modulation, state_dtype="float32")
    return dataclasses.replace(config, execution="integer", modulation=modulation)


def walk(shape: tuple[int, ...], steps: int = 5, dtype: torch.dtype = torch.float32, seed: int = 3) -> list[Tensor]:
    return drifting(seed, shape, steps, 0.3, dtype)


def output_bound(layer: nn.Module, x: Tensor, steps: int) -> float:
    fan_in = layer.weight[0].numel()
    return 2e-6 * steps * float(x.abs().max()) * float(layer.weight.detach().abs().max()) * fan_in


def same_bits(ours, theirs) -> None:
    for mine, expected in zip(ours, theirs, strict=True):
        for a, b in zip(mine, expected, strict=True):
            assert_same_bits(a, b)


def drawn(name: str, steps: int = 5, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[Tensor], int | None]:
    make, shape, split = LAYERS[name]
    return randomised(make()).to(dtype), walk(shape, steps, dtype), split


def follows(ours, theirs, bound: float) -> None:
    for (output, state, output_state), (expected, expected_state, expected_output) in zip(ours, theirs, strict=True):
        assert_same_bits(state, expected_state)
        assert (output.dtype, output_state.dtype) == (expected.dtype, expected_output.dtype)
        assert_within(output_state, expected_output, bound)
        assert_within(output, expected, bound)


def group_of(size: int, *, shared: bool, config: LayerConfig = W8A4) -> tuple[Clock, list[ModulatedLayer]]:
    clock = Clock("model")
    floats = [randomised(nn.Linear(8, 3), seed) for seed in range(size)]
    layers = [
        quantized_class(f).from_float(f, config, name=f"to_{'qkv'[i]}", clock=clock) for i, f in enumerate(floats)
    ]
    for layer in layers[1:] if shared else ():
        layer.share_with(layers[0])
    return clock, layers


def step(clock: Clock, layers: list[ModulatedLayer], *inputs: Tensor) -> list[Tensor]:
    clock.call(None)
    try:
        return [layer(x) for layer, x in zip(layers, inputs if len(inputs) > 1 else inputs * len(layers), strict=True)]
    finally:
        clock.returned()


W8A8 = integer(LayerConfig())
PLAIN = dataclasses.replace(W8A8, modulation=None)


class Model(nn.Module):
    def __init__(self, call: Callable[[Model, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.call = call
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def residual(m: Any, x: Tensor) -> Tensor:
    h = m.conv1(functional.silu(m.norm1(x)))
    h = m.conv2(m.dropout(functional.silu(m.norm2(h))))
    return h + m.shortcut(x)


def transformer(m: Any, x: Tensor) -> Tensor:
    shift, scale = m.condition(x.mean(1)).chunk(2, 1)
    y = m.norm(x) * (1 + scale[:, None]) + shift[:, None]
    q, k, v = m.q(y), m.k(y), m.v(y)
    x = x + functional.softmax(q @ k.transpose(1, 2), -1) @ v
    return x + m.fc2(m.dropout(functional.gelu(m.fc1(m.norm2(x)), approximate="tanh")))


def feed_forward(m: Any, x: Tensor) -> Tensor:
    hidden, gate = m.fc1(m.norm(x)).chunk(2, dim=-1)
    x = x + m.fc2(m.dropout(hidden * functional.gelu(gate)))
    hidden, gate = m.fc3(x).chunk(2, dim=-1)
    return x + m.fc4(functional.silu(gate) * hidden)


def tokens_of_pixels(m: Any, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    y = m.fc1(m.norm1(x).permute(0, 2, 3, 1).reshape(n, h * w, c))
    z = m.norm2(y.transpose(1, 2)).transpose(1, 2)
    return m.q(z) * m.k(z)


BLOCKS = {
    "conv": (lambda: Model(
        residual, norm1=nn.GroupNorm(4, 16), norm2=nn.GroupNorm(8, 16), conv1=nn.Conv2d(16, 16, 3, padding=1),
        conv2=nn.Conv2d(16, 16, 3, padding=1), shortcut=nn.Conv2d(16, 16, 3, padding=1), dropout=nn.Dropout(0.0),
    ), (2, 16, 6, 5), 2),
    "dit": (lambda: Model(
        transformer, norm=nn.LayerNorm(32, elementwise_affine=False, eps=1e-6), norm2=nn.LayerNorm(32),
        condition=nn.Linear(32, 64), q=nn.Linear(32, 32), k=nn.Linear(32, 32), v=nn.Linear(32, 32),
        fc1=nn.Linear(32, 64), fc2=nn.Linear(64, 32), dropout=nn.Dropout(0.1),
    ), (2, 7, 32), 5),
    "gated": (lambda: Model(
        feed_forward, norm=nn.LayerNorm(32), fc1=nn.Linear(32, 96), fc2=nn.Linear(48, 32), fc3=nn.Linear(32, 80),
        fc4=nn.Linear(40, 32), dropout=nn.Dropout(0.1),
    ), (2, 7, 32), 3),
    "tokens": (lambda: Model(
        tokens_of_pixels, norm1=nn.GroupNorm(4, 16), norm2=nn.GroupNorm(2, 16), fc1=nn.Linear(16, 16),
        q=nn.Linear(16, 16), k=nn.Linear(16, 16),
    ), (2, 16, 6, 5), 3),
}  # fmt: skip
"""What makes it, the shape of its input, how many layers take in what stands before them."""


def taken(model: nn.Module, layer: LayerConfig) -> Any:
    exclude = tuple(name for name, _ in model.named_children() if name == "condition")
    modiff.apply(model, ModiffConfig(layer=layer, exclude=exclude, first_last="quantize"))
    return model


def fused(model: nn.Module, counts: list[int]) -> Any:
    def rewrite(module: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        counts.append(fusion.fuse(module))
        return module.forward

    return torch.compile(model, backend=rewrite, fullgraph=True)


def made(make: Callable[[], Model], layer: LayerConfig = W8A8) -> Any:
    torch.manual_seed(0)
    return taken(make().eval(), layer)


def layers(model: nn.Module) -> list[ModulatedLayer]:
    return [m for m in model.modules() if isinstance(m, ModulatedLayer)]


def states(model: nn.Module) -> int:
    return len({id(memory.input) for layer in layers(model) for memory in layer.loop.memories.values()})
