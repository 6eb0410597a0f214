"""Drawn weights of the public Inception-v3 layout, which a network written apart reads by its names."""

from __future__ import annotations

import torch
from torch import Tensor

from modiff.evaluate.features.inception import InceptionNetwork


def shapes() -> dict[str, tuple[int, ...]]:
    """Every parameter and running statistic by name."""
    with torch.device("meta"):
        state = InceptionNetwork().state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items() if "num_batches" not in name}


def drawn(seed: int = 0) -> dict[str, Tensor]:
    """Weights that keep the size of what passes through."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith(("running_var", "bn.weight")):
            return torch.rand(shape, generator=generator) + 0.5
        values = torch.randn(shape, generator=generator)
        return values * (2 / values[0].numel()) ** 0.5 if values.ndim > 1 else values * 0.1

    return {name: tensor(name, shape) for name, shape in shapes().items()}
