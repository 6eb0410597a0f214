"""The toy of `tests.reference.masked` as a model with logits, and counts of what comes out."""

from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from tests.reference.masked import LETTERS, MASK, Toy


def number(tokens: Tensor, base: int) -> Tensor:
    """The number of each row of three tokens."""
    return (tokens * torch.tensor([base**2, base, 1])).sum(-1)


class Exact(nn.Module):
    """Logits of the exact denoiser; that of the mask is large, as nothing may draw it. evaluated: its calls."""

    def __init__(self, toy: Toy) -> None:
        super().__init__()
        with np.errstate(divide="ignore"):
            table = np.pad(np.log(toy.posterior()), ((0, 0), (0, 0), (0, 1)), constant_values=9.0)
        self.register_buffer("table", torch.tensor(table))
        self.evaluated: list[Tensor] = []

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        self.evaluated.append(input_ids.clone())
        return SimpleNamespace(logits=self.table[number(input_ids, MASK + 1)])


def shares(tokens: Tensor) -> np.ndarray:
    """(27,): how often each text came out."""
    return np.bincount(number(tokens, LETTERS).numpy(), minlength=LETTERS**3) / len(tokens)
