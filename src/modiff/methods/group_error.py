"""The error that quantized steps pile up over a group of steps, and its gradient (AccuQuant).

A group leads from x_t to x_{t-n} by x_{k-1} = advance_k(x_k, eps(x_k)). Its error is L = ||x^q_{t-n} - x^fp_{t-n}||²,
where x^q follows its own states. Exact back-propagation keeps n networks alive. Dropping how a network's output depends
on its own input state (d eps / d x = 0) leaves

    dL/dphi ~ sum_k <p_k, d eps(x^q_k) / dphi>,   p_k = (d x^q_{t-n} / d eps_k)^T 2 (x^q_{t-n} - x^fp_{t-n})

with p_k from the sampler's arithmetic alone: one network graph at a time, whatever n is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Evaluate = Callable[[int, Tensor], Tensor]
"""(step, state) -> what the sampler is told of the network's output, same shape as the state."""
Advance = Callable[[int, Tensor, Tensor], Tensor]
"""(step, state, output) -> the next state; elementwise and differentiable."""


@dataclass(frozen=True)
class Group:
    """Neighbouring steps of one trajectory's rows: where they start, and where full precision arrives.

    steps: indices. start: the quantized state before the first. target: the full-precision state after the last.
    """

    steps: Sequence[int]
    start: Tensor
    target: Tensor


def roll_out(group: Group, evaluate: Evaluate, advance: Advance) -> tuple[list[Tensor], list[Tensor]]:
    """The states (one more than steps) and outputs of the group's steps, without a graph."""
    states, outputs = [group.start], []
    with torch.no_grad():
        for step in group.steps:
            outputs.append(evaluate(step, states[-1]))
            states.append(advance(step, states[-1], outputs[-1]))
    return states, outputs


def error_of(arrived: Tensor, target: Tensor) -> Tensor:
    """||x^q - x^fp||² of a row, mean over the rows; 0-d."""
    return (arrived - target).square().flatten(1).sum(1).mean()


def approximate_gradient(
    group: Group, evaluate: Evaluate, advance: Advance, leaves: Sequence[Tensor]
) -> tuple[float, list[Tensor]]:
    """The error at the group's end, and its gradient without the path through the network's input states.

    Exact for one step. Cost: n evaluations without a graph, n forward and backward, memory of one.
    """
    states, outputs = roll_out(group, evaluate, advance)
    pull = 2 * (states[-1] - group.target) / len(group.start)
    totals = [torch.zeros_like(leaf) for leaf in leaves]
    for step, state, output in zip(reversed(group.steps), states[-2::-1], reversed(outputs), strict=True):
        with torch.enable_grad():
            known, told = state.detach().requires_grad_(), output.detach().requires_grad_()
            following, again = advance(step, known, told), evaluate(step, state)
        on_output, pull = torch.autograd.grad(following, (told, known), pull.to(following.dtype))
        gradients = torch.autograd.grad(again, list(leaves), on_output.to(again.dtype), allow_unused=True)
        for total, gradient in zip(totals, gradients, strict=True):
            if gradient is not None:
                total += gradient
    return float(error_of(states[-1], group.target)), totals
