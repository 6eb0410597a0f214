"""The recursion: a closed-loop predictive codec over the denoising steps (MoDiff, arXiv:2506.22463, Eq. 13, 14, 18).

For one layer with linear part A and bias b, at step t (t falls from T), with input a_t:

    prediction    p_t = predict(â_{t+1}, â_{t+2}, ...)         `predictors`: "hold" â_{t+1}, "linear", or yours
    residual      r_t = a_t - p_t            what the state does not hold yet, last step's rounding error included
    codes         q_t = quantize(r_t)        integers; 0 bits send nothing
    input state   â_t = p_t + q_t
    output state  ô_t = predict(ô_{t+1}, ô_{t+2}, ...) + A_q(q_t)

The law: ô_t = A_q(â_t) + (A - A_q)(a_anchor) + b, always, where A_q is A with quantized weights and the states started
from a_anchor: ô = A(a_anchor) + b there, and from then on only changes meet A_q. The rounding error of the weights acts
on a_anchor - â_t alone. An anchor that has A_q only gives the paper's ô_t = A_q(â_t) + b.

The bias enters once, with the anchor. The error a_t - â_t = r_t - q_t is the rounding of step t alone: what one step
does not send stays in the residual and is sent later.

Input and output are two functions, as several operators may read one tensor (q, k, v): `encode` turns an input into
an update and the next input state, `accumulate` the update into the next output state.

This page is the source of truth. Four places repeat its arithmetic where it has to be fast, and tests hold them to it,
codes and input states bit for bit: `kernels` with torch's operators in place, its compiled loops (csrc/), Triton, and
the fixed-point form for int16 states, which rounds scales up to a grid.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from modiff.config import ModulationConfig
from modiff.core.affine import QParams
from modiff.core.jumps import Anchor, from_zero
from modiff.core.predictors import Weight, predictor_named
from modiff.core.quantizer import Code, Quantizer


class State(NamedTuple):
    """The input or the output state: its value, â_t or ô_t, and its last moves, the newest first, if predicted from.

    least: of an input: no sample's value needs smaller scales, root mean square; 0 where that is not known.
    """

    value: Tensor
    moves: tuple[Tensor, ...] = ()
    least: float = 0.0


class Update(NamedTuple):
    """What one step hands from the input to the outputs.

    anchor: the input at full precision, where the states start. codes: rounds of integers.
    starts: True where the states start: whatever an output state was before is void.
    weights: of the last moves in the prediction.
    intra: rows whose prediction is zero, broadcastable to inputs and outputs; None for none of them.
    """

    anchor: Tensor | None
    codes: tuple[Code, ...]
    starts: bool = False
    weights: tuple[Weight, ...] = ()
    intra: Tensor | None = None


class LinearOperator(Protocol):
    """The layer as the recursion sees it."""

    def anchor(self, value: Tensor) -> Tensor:
        """A(value) + bias, with the best weight that there is."""
        ...

    def linear(self, codes: Code) -> Tensor:
        """A_q(codes), without bias."""
        ...

    def start(self) -> Tensor | float:
        """The bias, broadcastable to the output; 0 if there is none."""
        ...


_STORED = {
    **dict.fromkeys(("auto", "int16"), torch.float32),
    **{name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")},
}
"""The dtype of states by their config: integer states are float32, until a kernel makes integers of them."""


def compute_dtype(config: ModulationConfig) -> torch.dtype:
    """The dtype of the arithmetic: float64 for float64 states, else float32, whatever the states are stored in."""
    return torch.float64 if config.state_dtype == "float64" else torch.float32


def predict(state: State, weights: Sequence[Weight], dtype: torch.dtype) -> Tensor:
    """p_t = â_{t+1} + Σ_k w_k (â_{t+k} - â_{t+k+1}), in `dtype`."""
    value = state.value.to(dtype)
    for weight, move in zip(weights, state.moves, strict=False):
        value = value + weight * move.to(dtype)
    return value


def _next(value: Tensor, state: State, config: ModulationConfig, intra: Tensor | None, least: float = 0.0) -> State:
    dtype, moves = _STORED[config.state_dtype], predictor_named(config.predictor).past_states - 1
    if moves == 0:
        return State(value.to(dtype), least=least)
    moved = (value - state.value.to(value.dtype)).to(dtype), *state.moves[: moves - 1]
    if intra is not None:  # where to it moves on, the next step will tell
        moved = tuple(move.masked_fill(intra, 0.0) for move in moved)
    return State(value.to(dtype), moved)


def encode(
    x: Tensor,
    state: State | None,
    quantizer: Quantizer,
    config: ModulationConfig,
    ratio: Weight = 1.0,
    scales: Sequence[QParams] | None = None,
    anchor: Anchor | None = None,
) -> tuple[Update, State]:
    """One step of the input.

    Args:
        x: a_t, any shape and float dtype. anchor: where the states started, if they may begin at zero for its distance.
        state: â_{t+1}, or None where the states start (first step, re-anchoring).
        ratio: size of this step over the last one, for predictors. scales: of an earlier step; None: the quantizer's.
    Returns: the update for every operator that reads x, and â_t.
    Cost: one pass for the residual, one for its range, one for codes and state; more where samples may jump.
    """
    x = x.detach().to(compute_dtype(config))
    if state is None:
        return _anchor(x, quantizer, config)
    weights = predictor_named(config.predictor).weights(len(state.moves), config.gain, ratio) if state.moves else ()
    prediction = predict(state, weights, x.dtype) if weights else state.value.to(x.dtype)
    intra, least, largest = quantizer.intra(x) if quantizer.of_values else None, 0.0, 0.0
    prediction = prediction if intra is None else prediction.masked_fill(intra, 0.0)
    codes = quantizer(x - prediction) if scales is None else quantizer.scaled(x - prediction, scales)
    if config.error_compensation == "none":  # the ablation holds the raw input: rounding errors are never sent again
        return Update(None, () if codes is None else (codes,)), State(x.to(_STORED[config.state_dtype], copy=True))
    if codes is not None and scales is None and quantizer.finds_jumps:
        for _, qparams in codes.parts if x.is_cpu else ():
            largest = max(largest, float(qparams.scale.max()))
        least, due = state.least - largest, anchor is not None and anchor.due()
        if due or not 1.001 * largest < least:
            smooth, held = least if 1.001 * largest < least else None, state.value if weights else None
            intra, least, codes = from_zero(x, prediction, codes, quantizer, smooth, held, anchor, due=due)
            prediction = prediction if intra is None else prediction.masked_fill(intra, 0.0)
        least = least - largest * quantizer.unsent if x.dtype == _STORED[config.state_dtype] else 0.0
    value = prediction if codes is None else prediction + codes.value()
    update = Update(None, () if codes is None else (codes,), weights=weights, intra=intra)
    return update, _next(value, state, config, intra, least)


def _anchor(x: Tensor, quantizer: Quantizer, config: ModulationConfig) -> tuple[Update, State]:
    """Start the states: â_T = a_T, or rounds of codes, each with a fresh scale (a stale one would never contract)."""
    if config.first_step == "full_precision":
        return Update(x, (), starts=True), State(x.to(_STORED[config.state_dtype], copy=True))
    value = torch.zeros_like(x)
    rounds: list[Code] = []
    for _ in range(config.rounds):
        codes = quantizer.fresh(x - value)
        if codes is not None:
            value = value + codes.value()
            rounds.append(codes)
    if config.error_compensation == "none":
        value = x  # the ablation differences raw inputs, so the error of the start stays for ever
    return Update(None, tuple(rounds), starts=True), State(value.to(_STORED[config.state_dtype], copy=True))


def encode_plain(x: Tensor, quantizer: Quantizer) -> Update:
    """Plain quantization: predict zero, remember nothing. q_t = quantize(a_t)."""
    codes = quantizer(x.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32))
    return Update(None, () if codes is None else (codes,))


def accumulate(update: Update, state: State | None, operator: LinearOperator, config: ModulationConfig) -> State:
    """One step of an output: ô_t = predict(ô_{t+1}, ...) + A_q(q_t).

    Where the states start, ô_T = A(â_T) + b. Cost: one operator a round, none at 0 bits, and one pass over the output.
    """
    if update.anchor is not None:
        return State(operator.anchor(update.anchor).to(_STORED[config.state_dtype]))
    if state is None or update.starts:
        return State(output_of(update, operator).to(_STORED[config.state_dtype]))
    value = state.value.to(compute_dtype(config))
    if update.weights:
        value = predict(state, update.weights, value.dtype)
    if update.intra is not None:
        value = torch.where(update.intra, torch.as_tensor(operator.start(), device=value.device), value)
    for codes in update.codes:
        value = value + operator.linear(codes)
    return _next(value, state, config, update.intra)


def output_of(update: Update, operator: LinearOperator) -> Tensor:
    """A_q(q_t) + b of an update alone: what a layer without memory returns. Cost: one operator."""
    total: Tensor | float = 0.0
    for codes in update.codes:
        total = total + operator.linear(codes)
    return torch.as_tensor(operator.start() + total)
