"""Predictors: what a state will be at the next step, from what it was at the last ones.

    p_t = Σ_k c_k â_{t+k},   Σ_k c_k = 1                 "hold": c = (1)      "linear": c = (1 + g, -g)
        = â_{t+1} + Σ_k w_k (â_{t+k} - â_{t+k+1})        "hold": w = ()       "linear": w = (g)

A predictor gives w, the weights of the last moves. In this form the coefficients sum to 1 whatever w is, so the output
state, predicted by the same weights, keeps its bias.
"""

import functools
from typing import Protocol

from torch import Tensor

from modiff.config import PREDICTORS
from modiff.errors import ConfigError

Weight = Tensor | float
"""Of one move; a tensor has one element."""


class Predictor(Protocol):
    """A rule of extrapolation.

    past_states: how many states it looks at, k = 1, ..., past_states; each costs the memory of one.
    """

    past_states: int

    def weights(self, moves: int, gain: float, ratio: Weight) -> tuple[Weight, ...]:
        """w_1, w_2, ..., at most one for each of the `moves` that are known: 0 after an anchor, then past_states - 1.

        gain: that of `ModulationConfig`. ratio: size of this step over the last one; 1.0 without timesteps.
        """
        ...


class Hold:
    """p_t = â_{t+1}."""

    past_states = 1

    def weights(self, moves: int, gain: float, ratio: Weight) -> tuple[Weight, ...]:
        """None."""
        return ()


class Linear:
    """p_t = â_{t+1} + g (â_{t+1} - â_{t+2}), g = min(1, gain * ratio): an uneven schedule moves the input unevenly."""

    past_states = 2

    def weights(self, moves: int, gain: float, ratio: Weight) -> tuple[Weight, ...]:
        """(g), once there is a move.

        >>> Linear().weights(1, 0.8, 0.5), Linear().weights(0, 0.8, 0.5)
        ((0.4,), ())
        """
        if not moves:
            return ()
        product = gain * ratio
        return (product.clamp(0.0, 1.0) if isinstance(product, Tensor) else min(1.0, max(0.0, product)),)


_PREDICTORS: dict[str, Predictor] = {"hold": Hold(), "linear": Linear()}


def register_predictor(name: str, predictor: Predictor) -> None:
    """Let `ModulationConfig(predictor=name)` mean `predictor`, in this process; layers that use it are simulated.

    Raises: ConfigError if the name is taken.
    """
    if name in _PREDICTORS:
        raise ConfigError(f"register_predictor: expected a new name, got {name!r}. Configs that say {name!r} mean "
                          "another predictor. Choose another name.")  # fmt: skip
    _PREDICTORS[name] = predictor
    PREDICTORS.append(name)


@functools.cache
def predictor_named(name: str) -> Predictor:
    """The predictor that a config names. Raises: ConfigError where the name is not registered."""
    if name not in _PREDICTORS:
        raise ConfigError(f"predictor: expected one of {', '.join(_PREDICTORS)}, got {name!r}. It says how many past "
                          "states there are. Name one of them, or register it first.")  # fmt: skip
    return _PREDICTORS[name]
