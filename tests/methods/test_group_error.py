"""Gradients of the error at a group's end: exact where they should be, close elsewhere, flat in memory."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

from accuquant_groups import exact_gradient
from modiff.methods.group_error import Group, approximate_gradient

CARRY, DRIFT = 0.97, -0.11


class Net:
    """eps(x, k) = tanh(mix x W_k) + b_k with two leaves; mix 0 makes it blind to its input state."""

    def __init__(self, mix: float) -> None:
        generator = torch.Generator().manual_seed(5)
        self.mix = mix
        self.weight = torch.randn(8, 6, 6, generator=generator, dtype=torch.float64) / 3
        self.scale = torch.tensor([0.7, 1.3], dtype=torch.float64, requires_grad=True)
        self.bias = torch.randn(6, generator=generator, dtype=torch.float64).requires_grad_()
        self.unused = torch.ones(2, dtype=torch.float64, requires_grad=True)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.scale, self.bias, self.unused]

    def evaluate(self, step: int, state: Tensor) -> Tensor:
        return self.scale[step % 2] * torch.tanh(self.mix * state @ self.weight[step] + 0.3 * step) + self.bias


def advance(step: int, state: Tensor, output: Tensor) -> Tensor:
    return (CARRY * state + DRIFT * (1 + step) * output).clamp(-2, 2)


def group(steps: int) -> Group:
    generator = torch.Generator().manual_seed(6)
    start, target = (torch.randn(3, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    return Group(range(2, 2 + steps), start, target)


def cosine(mine: list[Tensor], true: list[Tensor]) -> float:
    a, b = (torch.cat([t.flatten() for t in gradients]) for gradients in (mine, true))
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize(("steps", "mix"), [(1, 1.0), (1, 0.0), (4, 0.0), (6, 0.0)])
def test_the_gradient_is_exact_for_one_step_and_for_a_network_blind_to_its_state(steps: int, mix: float) -> None:
    net = Net(mix)
    error, gradients = approximate_gradient(group(steps), net.evaluate, advance, net.leaves)
    true_error, expected = exact_gradient(group(steps), net.evaluate, advance, net.leaves)
    assert error == pytest.approx(true_error, rel=1e-12)
    for mine, true in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("steps", "least"), [(2, 0.95), (4, 0.9)])
def test_the_approximate_gradient_points_where_the_exact_one_does(steps: int, least: float) -> None:
    net = Net(0.5)
    _, gradients = approximate_gradient(group(steps), net.evaluate, advance, net.leaves)
    _, expected = exact_gradient(group(steps), net.evaluate, advance, net.leaves)
    assert least < cosine(gradients, expected) < 1 - 1e-6


def alive_at_most(steps: int) -> int:
    """The most values that autograd kept at any time."""
    history = [0]

    def keep(tensor: Tensor) -> Tensor:
        copy, values = tensor.detach().clone(), tensor.numel()
        history.append(history[-1] + values)
        weakref.finalize(copy, lambda: history.append(history[-1] - values))
        return copy

    net = Net(0.5)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        approximate_gradient(group(steps), net.evaluate, advance, net.leaves)
    return max(history)


def test_the_memory_of_the_graph_does_not_grow_with_the_group() -> None:
    assert 0 < alive_at_most(6) <= alive_at_most(1)
