"""Small networks that a rewriting of graphs is tried on, and how."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import modiff
from modiff import LayerConfig, ModiffConfig
from modiff.nn import ModulatedLayer, fusion

W8A8 = LayerConfig(execution="integer")
PLAIN = dataclasses.replace(W8A8, modulation=None)


class Model(nn.Module):
    """Any function of x between modules that it names."""

    def __init__(self, call: Callable[[Model, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.call = call
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def residual(m: Any, x: Tensor) -> Tensor:
    """As a residual block: norm1 and the shortcut read the same x."""
    h = m.conv1(functional.silu(m.norm1(x)))
    h = m.conv2(m.dropout(functional.silu(m.norm2(h))))
    return h + m.shortcut(x)


def transformer(m: Any, x: Tensor) -> Tensor:
    """As a DiT block: a modulated norm that three layers read, and GELU between two."""
    shift, scale = m.condition(x.mean(1)).chunk(2, 1)
    y = m.norm(x) * (1 + scale[:, None]) + shift[:, None]
    q, k, v = m.q(y), m.k(y), m.v(y)
    x = x + functional.softmax(q @ k.transpose(1, 2), -1) @ v
    return x + m.fc2(m.dropout(functional.gelu(m.fc1(m.norm2(x)), approximate="tanh")))


def feed_forward(m: Any, x: Tensor) -> Tensor:
    """As Stable Diffusion's: GEGLU; and as others do, SwiGLU."""
    hidden, gate = m.fc1(m.norm(x)).chunk(2, dim=-1)
    x = x + m.fc2(m.dropout(hidden * functional.gelu(gate)))
    hidden, gate = m.fc3(x).chunk(2, dim=-1)
    return x + m.fc4(functional.silu(gate) * hidden)


def tokens_of_pixels(m: Any, x: Tensor) -> Tensor:
    """As SDXL's transformers begin, and then as attention in the oldest U-Nets."""
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
    """How many input states there are."""
    return len({id(memory.input) for layer in layers(model) for memory in layer.loop.memories.values()})
