"""MoDiff's recursion as a plain loop over the steps, float64; imports nothing of modiff.

Follows arXiv:2506.22463, Eq. 13, 14, 18, plus: clip ratio, linear predictor, rotation, split input, zero bits, coded
first step, re-anchoring, rows that are predicted as zero, and the open loop of the ablation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.reference.hadamard import along
from tests.reference.quantizer import Quantized, quantize_runs


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that the recursion depends on, in plain words.

    operator, anchor: the linear part for what is sent, and for the input in full precision where the states start.
    bits: 0 sends nothing. matrix: the rotation, None for none; `operator` then expects rotated inputs.
    rounds: 0 for a first step in full precision, else the number of coded rounds.
    """

    operator: Callable[[Tensor], Tensor]
    anchor: Callable[[Tensor], Tensor]
    bias: Tensor | float
    bits: int
    runs: tuple[int, ...]
    granularity: str = "tensor"
    channel_dim: int = -1
    symmetric: bool = True
    clip: float = 1.0
    predictor: str = "hold"
    gain: float = 1.0
    compensated: bool = True
    rounds: int = 0
    reanchor_every: int = 0
    matrix: Tensor | None = None


@dataclass(frozen=True)
class Step:
    """What one step leaves: both states, what was sent (None: nothing, or full precision), and the residual."""

    input_state: Tensor
    output_state: Tensor
    sent: Quantized | None
    residual: Tensor


def _code(residual: Tensor, recipe: Recipe) -> Quantized:
    return quantize_runs(
        residual, recipe.runs, recipe.bits, recipe.granularity,
        symmetric=recipe.symmetric, clip=recipe.clip, channel_dim=recipe.channel_dim,
    )  # fmt: skip


def _jumped(x: Tensor, guess: Tensor, held: Tensor, recipe: Recipe) -> Tensor:
    """The samples whose residual would be coded more coarsely, and with a larger error, than they themselves.

    held: the state, which must be further away as well: a prediction may have moved too far.
    """
    if not recipe.bits or not recipe.compensated:
        return torch.tensor(False)
    axes = tuple(range(recipe.granularity in ("sample", "token"), x.dim()))
    sides = [(value, _code(value, recipe)) for value in (x - guess, x, x - held)]
    noise = [code.step.square().sum(axes, keepdim=True) for _, code in sides]
    error = [(value - code.value).square().sum(axes, keepdim=True) for value, code in sides]
    return (noise[0] > noise[1]) & (noise[2] > noise[1]) & (error[0] > error[1])


def run(inputs: Sequence[Tensor], recipe: Recipe, sizes: Sequence[float] | None = None) -> list[Step]:
    """All steps of a trajectory. `sizes[t]` is the step size before input t (ignored at 0); None: all alike."""
    steps: list[Step] = []
    a = o = torch.zeros(0)
    move_a = move_o = None
    for t, x in enumerate(inputs):
        x = x.double() if recipe.matrix is None else along(x, recipe.matrix, recipe.channel_dim)
        starts = t == 0 or (recipe.reanchor_every and t % recipe.reanchor_every == 0)
        if starts:
            a, o, sent, residual = _start(x, recipe)
            move_a = move_o = None
        else:
            g = 0.0
            if recipe.predictor == "linear" and move_a is not None:
                ratio = 1.0 if sizes is None else sizes[t] / sizes[t - 1]
                g = min(1.0, recipe.gain * ratio)
            guess_a = a if move_a is None else a + g * move_a
            guess_o = o if move_o is None else o + g * move_o
            rows = _jumped(x, guess_a, a, recipe)
            guess_a, guess_o = guess_a.masked_fill(rows, 0.0), torch.where(rows, recipe.bias, guess_o)
            residual = x - guess_a
            sent = _code(residual, recipe) if recipe.bits else None
            new_a = guess_a if sent is None else guess_a + sent.value
            new_o = guess_o if sent is None else guess_o + recipe.operator(sent.value)
            if not recipe.compensated:
                new_a = x
            move_a, move_o = (new_a - a).masked_fill(rows, 0.0), (new_o - o).masked_fill(rows, 0.0)
            a, o = new_a, new_o
        steps.append(Step(a, o, sent, residual))
    return steps


def _start(x: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor, Quantized | None, Tensor]:
    if recipe.rounds == 0:
        return x, recipe.anchor(x) + recipe.bias, None, torch.zeros_like(x)
    a, o, sent = torch.zeros_like(x), torch.as_tensor(recipe.bias).double(), None
    residual = x
    for _ in range(recipe.rounds):
        residual = x - a
        sent = _code(residual, recipe)
        a, o = a + sent.value, o + recipe.operator(sent.value)
    return (a if recipe.compensated else x), o, sent, residual
