"""Modulation along the window of a parallel sampler: neighbouring rows of one call are the steps of a trajectory.

For the rows j = b, ..., e-1 of one sample, inside one batched call and for each layer:

    row b      â_b = a_b                                 ô_b = A(a_b) + b              an anchor
    others     q_j = quantize(a_j - â_{j-1})             â_j = â_{j-1} + q_j           a scan, element by element
               ô_j = ô_{j-1} + A_q(q_j)                  one product of all rows, then their sums in float32

It is the recursion of `core.recursion` over rows instead of calls: ô_j = A_q(â_j) + (A - A_q)(a_b) + b for every row,
what one row does not send goes with the next, and nothing is kept when the call ends.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor, nn

from modiff.config import check
from modiff.core.predictors import predictor_named
from modiff.core.quantizer import Code
from modiff.core.recursion import State, Update, accumulate
from modiff.errors import StateError
from modiff.kernels.input_fusion import InputFusion
from modiff.model.attach import required_attachment
from modiff.nn.loop.simulated import InputState, SimulatedLoop
from modiff.nn.operator import LayerOperator

_ROWS: ContextVar[int] = ContextVar("rows of each sample in this call", default=0)


@contextmanager
def rows_in_call(rows: int) -> Iterator[None]:
    """In the body, each sample of a network's batch has this many rows, next to each other."""
    token = _ROWS.set(rows)
    try:
        yield
    finally:
        _ROWS.reset(token)


@contextmanager
def along_window(network: nn.Module) -> Iterator[None]:
    """In the body, the modulated layers of a network run along the rows that a `ParallelSampler` gives them.

    Layers on integers are simulated. Plain layers are as they are. `reanchor_every` counts rows.

    Raises: StateError without modulated layers; ConfigError for a predictor that looks at step sizes ("hold" does not),
        or for scales per step: the rows of a call have different timesteps.
    Cost: for each layer and row a pass over its input, as in a trajectory; one product a call, and the anchor's.
    """
    attachment = required_attachment(network, "along_window")
    for name, layer in attachment.layers.items():
        modulation, activation = layer.config.modulation, layer.config.activation
        where, why = f"along_window: {name}", "The rows of one call have different timesteps. Use "
        check(f"{where}: step_groups", activation.step_groups, activation.step_groups == 1, "1 set of scales",
              f"{why}dynamic=True.")  # fmt: skip
        if modulation is not None:
            hold = predictor_named(modulation.predictor).past_states == 1
            check(f"{where}: predictor", modulation.predictor, hold, "'hold'", f"{why}predictor='hold'.")
    loops = [layer.loop for layer in attachment.layers.values() if layer.inputs is not None]
    clock, active, automatic = attachment.clock, attachment.clock.active, attachment.automatic
    clock.active, attachment.automatic = False, None  # a call is a whole trajectory: there are no steps to count
    try:
        for loop in loops:
            vars(loop)["step"] = functools.partial(_step, loop)
        yield
    finally:
        clock.active, attachment.automatic = active, automatic
        for loop in loops:
            vars(loop).pop("step", None)


def _step(loop: SimulatedLoop, x: Tensor, fusion: InputFusion | None = None, read: int | None = None) -> Tensor:
    """`SimulatedLoop.step` for all rows of a call: the outputs of a trajectory over the rows of each sample."""
    rows = _ROWS.get()
    if not rows or len(x) % rows:
        raise StateError(
            f"{loop.spec.name}: expected {rows or 'known'} rows for each sample, got a batch of {len(x)}. Inside of "
            "`along_window` the rows are steps. Call the network by what modiff.sampling.parallel.rows_of makes of it, "
            "or exclude the layer."
        )
    value = (x if fusion is None else fusion.compute(x)).unflatten(0, (-1, rows))
    inputs, every = InputState(loop.spec, loop.quantizer, loop.modulation, loop.clock), loop.modulation.reanchor_every
    updates: list[Update] = []
    for row in range(rows):
        if every and row % every == 0:
            inputs.states, inputs.age = (), 0
        updates.append(inputs.advance(value[:, row], None))
    output: State | None = None
    outputs: list[Tensor] = []
    operator = _Products(loop.operator, updates)
    for update in updates:
        output = accumulate(update, output, operator, loop.modulation)
        outputs.append(output.value)
    return torch.stack(outputs, 1).flatten(0, 1).to(x.dtype)


class _Values(NamedTuple):
    """What the codes of several rows stand for, next to each other."""

    tensor: Tensor

    def value(self) -> Tensor:
        return self.tensor


class _Products:
    """A layer's operator whose products of the rows' codes are one product, made before."""

    def __init__(self, operator: LayerOperator, updates: list[Update]) -> None:
        self.anchor, self.start, self._operator = operator.anchor, operator.start, operator
        self._products: dict[Code, Tensor] = {}
        codes = [code for update in updates if not update.starts for code in update.codes]
        if codes:
            products = operator.linear(_Values(torch.cat([code.value() for code in codes])))
            self._products = dict(zip(codes, products.chunk(len(codes)), strict=True))

    def linear(self, codes: Code) -> Tensor:
        return self._products[codes] if codes in self._products else self._operator.linear(codes)
