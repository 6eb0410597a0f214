"""The life of the states: one generation, first step to last; and the memory they take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from modiff.model.attach import required_attachment


@contextmanager
def model_trajectory(model: nn.Module) -> Iterator[None]:
    """Run one generation: states start empty and are freed at the end, also when the body raises.

    Raises: StateError if modiff was not applied to the model, or inside another trajectory of it.
    """
    attachment = required_attachment(model, "trajectory")
    if attachment.automatic is not None:
        attachment.automatic.end()  # one that began by itself gives way
    clock = attachment.clock
    clock.start()
    try:
        yield
    finally:
        clock.stop()


@contextmanager
def model_context(model: nn.Module, name: str) -> Iterator[None]:
    """Evaluations in the body use states of their own: "cond" and "uncond" of guidance in two calls.

    Raises: StateError if modiff was not applied to the model.
    """
    clock = required_attachment(model, "context").clock
    before, clock.context = clock.context, name
    try:
        yield
    finally:
        clock.context = before


def state_bytes(model: nn.Module) -> int:
    """Measured bytes of all states, input and output, of all contexts; a state that layers share counts once.

    The moves that the linear predictor keeps are counted too. 0 between trajectories: the states are freed then.
    Raises: StateError if modiff was not applied to the model.
    """
    return required_attachment(model, "state_bytes").state_bytes()
