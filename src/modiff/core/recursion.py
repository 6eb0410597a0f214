"""The recursion: a closed-loop predictive codec over the denoising steps (MoDiff, arXiv:2506.22463, Eq. 13, 14, 18).

For one layer with linear part A and bias b, at step t (t falls from T), with input a_t:

    prediction    p_t = â_{t+1}                                "hold"
                  p_t = â_{t+1} + g (â_{t+1} - â_{t+2})        "linear"
    residual      r_t = a_t - p_t          what the state does not hold yet, last step's rounding error included
    code          q_t = code(r_t)          integers; 0 bits send nothing
    input state   â_t = p_t + q_t
    output state  ô_t = ô_{t+1} [+ g (ô_{t+1} - ô_{t+2})] + A_q(q_t)

The law: ô_t = A_q(â_t) + (A - A_q)(a_anchor) + b, always, where A_q is A with quantized weights and the states started
from a_anchor: ô = A(a_anchor) + b there, and from then on only changes meet A_q. The rounding error of the weights acts
on a_anchor - â_t alone. An anchor that has A_q only gives the paper's ô_t = A_q(â_t) + b.

The bias enters once, with the anchor. The error a_t - â_t = r_t - q_t is the rounding of step t alone: what one step
does not send stays in the residual and is sent later.

The two sides are two functions, so that several operators can read one coded tensor (q, k, v): `encode` turns an input
into a message and the next input state, `accumulate` turns a message into the next output state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from modiff.config import ModulationConfig
from modiff.core.held_scales import HeldScales
from modiff.core.quantizer import Coded, Quantizer


class State(NamedTuple):
    """One side of a layer. value: â_t or ô_t. move: its change since step t+1, kept by the linear predictor only."""

    value: Tensor
    move: Tensor | None = None


class Message(NamedTuple):
    """What one step sends from the input side to the output side.

    anchor: the input at full precision, where the states start. codes: rounds of integers.
    starts: True where the states start: whatever the output side held before is void.
    gain: weight of the last move (tensor of one element or float), None where there is no move to repeat.
    """

    anchor: Tensor | None
    codes: tuple[Coded, ...]
    starts: bool = False
    gain: Tensor | float | None = None


class Operator(Protocol):
    """The layer as the recursion sees it."""

    def anchor(self, value: Tensor) -> Tensor:
        """A(value) + bias, with the best weight that there is."""
        ...

    def linear(self, code: Coded) -> Tensor:
        """A_q(code), without bias."""
        ...

    def start(self) -> Tensor | float:
        """The bias, broadcastable to the output; 0 if there is none."""
        ...


def compute_dtype(config: ModulationConfig) -> torch.dtype:
    """The dtype of the arithmetic: float64 for float64 states, else float32, whatever the states are stored in."""
    return torch.float64 if config.state_dtype == "float64" else torch.float32


def state_dtype(config: ModulationConfig) -> torch.dtype:
    """The dtype of the states here: integer states are float32, until a kernel makes integers of them."""
    return torch.float32 if config.state_dtype == "int16" else getattr(torch, config.state_dtype)


def _store(value: Tensor, config: ModulationConfig) -> Tensor:
    return value.to(state_dtype(config))


def _keep(x: Tensor, config: ModulationConfig) -> Tensor:
    """A copy: the model may change its own tensor in place later."""
    return x.to(state_dtype(config), copy=True)


def step_gain(config: ModulationConfig, ratio: Tensor | float) -> Tensor | float:
    """g_t = min(1, g * (step size now / step size before)): an uneven schedule moves the input unevenly."""
    product = config.gain * ratio
    return product.clamp(0.0, 1.0) if isinstance(product, Tensor) else min(1.0, max(0.0, product))


def encode(
    x: Tensor,
    state: State | None,
    quantizer: Quantizer | HeldScales,
    config: ModulationConfig,
    ratio: Tensor | float = 1.0,
) -> tuple[Message, State]:
    """One step of the input side.

    Args:
        x: a_t, any shape and float dtype.
        state: â_{t+1}, or None where the states start (first step, re-anchoring).
        quantizer: codes a residual.
        ratio: step size now over step size before, for the linear predictor.
    Returns: the message for every operator that reads x, and â_t.
    Cost: one pass for the residual, one for its range, one for codes and state.
    """
    x = x.detach().to(compute_dtype(config))
    if state is None:
        return _anchor(x, quantizer, config)
    if config.error_compensation == "none":
        return _encode_open_loop(x, state, quantizer, config)
    gain = None
    prediction = state.value.to(x.dtype)  # p_t = â_{t+1}
    if state.move is not None:
        gain = step_gain(config, ratio)
        prediction = prediction + gain * state.move.to(x.dtype)  # p_t = â_{t+1} + g (â_{t+1} - â_{t+2})
    code = quantizer(x - prediction)  # q_t = code(a_t - p_t)
    value = prediction if code is None else prediction + code.value()  # â_t = p_t + q_t
    message = Message(None, () if code is None else (code,), gain=gain)
    return message, State(_store(value, config), _move(value, state, config))


def _move(value: Tensor, state: State, config: ModulationConfig) -> Tensor | None:
    """â_t - â_{t+1}, for the linear predictor of the next step."""
    if config.predictor == "hold":
        return None
    return _store(value - state.value.to(value.dtype), config)


def _anchor(x: Tensor, quantizer: Quantizer | HeldScales, config: ModulationConfig) -> tuple[Message, State]:
    """Start the states: â_T = a_T, or rounds of codes, each with a fresh scale (a stale one would never contract)."""
    if config.first_step == "full_precision":
        return Message(x, (), starts=True), State(_keep(x, config))
    value = torch.zeros_like(x)
    codes: list[Coded] = []
    for _ in range(config.rounds):
        code = quantizer.fresh(x - value)
        if code is not None:
            value = value + code.value()
            codes.append(code)
    if config.error_compensation == "none":
        value = x  # the ablation differences raw inputs, so the error of the start stays for ever
    return Message(None, tuple(codes), starts=True), State(_keep(value, config))


def _encode_open_loop(
    x: Tensor, state: State, quantizer: Quantizer | HeldScales, config: ModulationConfig
) -> tuple[Message, State]:
    """The ablation: q_t = code(a_t - a_{t+1}); the state holds the raw input: rounding errors are never sent again."""
    code = quantizer(x - state.value.to(x.dtype))
    return Message(None, () if code is None else (code,)), State(_keep(x, config))


def encode_plain(x: Tensor, quantizer: Quantizer) -> Message:
    """Plain quantization: predict zero, remember nothing. q_t = code(a_t)."""
    code = quantizer(x.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32))
    return Message(None, () if code is None else (code,))


def accumulate(message: Message, state: State | None, operator: Operator, config: ModulationConfig) -> State:
    """One step of the output side: ô_t = ô_{t+1} + g (ô_{t+1} - ô_{t+2}) + A_q(q_t).

    Where the states start, ô_T = A(â_T) + b. Cost: one operator a round, none at 0 bits, and one pass over the output.
    """
    if message.anchor is not None:
        return State(_store(operator.anchor(message.anchor), config))
    sent = _sum(operator.linear, message.codes)
    if state is None or message.starts:
        return State(_store(torch.as_tensor(operator.start() + sent), config))
    value = state.value.to(compute_dtype(config))
    if message.gain is not None and state.move is not None:
        value = value + message.gain * state.move.to(value.dtype)
    value = value + sent
    return State(_store(value, config), _move(value, state, config))


def _sum(linear: Callable[[Coded], Tensor], codes: tuple[Coded, ...]) -> Tensor | float:
    total: Tensor | float = 0.0
    for code in codes:
        total = total + linear(code)
    return total


def output_of(message: Message, operator: Operator) -> Tensor:
    """A(q_t) + b of a plain message: what a layer without memory returns. Cost: one operator."""
    return torch.as_tensor(operator.start() + _sum(operator.linear, message.codes))
