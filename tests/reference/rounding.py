"""Learned rounding and learned steps in plain Python numbers (float64), from the formulas; imports nothing of modiff.

AdaRound:  h(v) = min(max(1.2 / (1 + e^-v) - 0.1, 0), 1),  W_q = s (clamp(floor(W / s) + h + z) - z)
Learned step:  Q(x) = s round(clamp(x / s, qmin - z, qmax - z)), with round(u) = u + constant under a derivative
"""

import itertools
import math
from collections.abc import Callable


def share(logit: float) -> float:
    return min(max(1.2 / (1 + math.exp(-logit)) - 0.1, 0.0), 1.0)


def bounds(bits: int) -> tuple[int, int]:
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def soft(weight: float, scale: float, zero: int, bits: int, v: float) -> float:
    low, high = bounds(bits)
    return scale * (min(max(math.floor(weight / scale) + share(v) + zero, low), high) - zero)


def code(weight: float, scale: float, zero: int, bits: int, v: float) -> int:
    low, high = bounds(bits)
    return min(max(math.floor(weight / scale) + (1 if share(v) >= 0.5 else 0) + zero, low), high)


def penalty(logits: list[float], beta: float) -> float:
    return sum(1 - abs(2 * share(v) - 1) ** beta for v in logits)


def best_rounding(weights: list[float], scale: float, bits: int, loss: Callable[[list[float]], float]) -> float:
    low, high = bounds(bits)
    choices = [{scale * min(max(math.floor(w / scale) + up, low), high) for up in (0, 1)} for w in weights]
    return min(loss(list(rounded)) for rounded in itertools.product(*choices))


def step_gradient(x: float, scale: float, zero: int, bits: int) -> float:
    low, high = bounds(bits)
    ratio = x / scale
    cut = min(max(ratio, low - zero), high - zero)
    return cut if cut != ratio else round(ratio) - ratio


def input_gradient(x: float, scale: float, zero: int, bits: int) -> float:
    low, high = bounds(bits)
    return 1.0 if low - zero <= x / scale <= high - zero else 0.0
