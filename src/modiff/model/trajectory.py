"""The life of the states: one generation, first step to last; the memory they take; copies that share all but them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from modiff.model.attach import attachment_of, required_attachment


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


def shared_copy(target: Any) -> Any:
    """A copy of a module, or of what holds modules, with the same parameters, buffers, codes and kernels."""
    holders = [target] if isinstance(target, nn.Module) else vars(target).values()
    memo: dict[int, Any] = {}
    networks = [module for module in holders if isinstance(module, nn.Module)]
    for network in networks:
        for tensor in (*network.parameters(), *network.buffers()):
            memo[id(tensor)] = tensor
        attachment = attachment_of(network)
        for layer in () if attachment is None else attachment.layers.values():
            for shared in (*_tensors(vars(layer.quantized_weight)), *vars(layer.loop).get("_kernels", ())):
                memo[id(shared)] = shared
            memo[id(layer.loop.memories)] = {}
            if layer.inputs is not None:
                memo[id(layer.inputs.states)] = []
    copied = copy.deepcopy(target, memo)
    for module in [copied] if isinstance(copied, nn.Module) else vars(copied).values():
        attachment = attachment_of(module) if isinstance(module, nn.Module) else None
        if attachment is not None:
            attachment.clock.stop()
            if attachment.automatic is not None:
                attachment.automatic.end()
    return copied


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors(inner)
