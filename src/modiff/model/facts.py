"""What must be known of a network that its modules do not say; whoever hosts it knows."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


class NetworkFacts:
    """Facts of a network, as `modiff.Host` gives them; the defaults are those of a plain module.

    default_exclude: patterns on names of layers that are left in full precision where a config names none: what reads
        the time step or the class alone is a few rows, costs nothing and has a large effect.
    timestep_names: of the argument of `forward` that holds the time step; a network without one counts evaluations.
    unbatched: keyword arguments without a batch axis, such as positions.
    block_classes: patterns on class names; a module that matches is learned as a whole by `modiff.reconstruct`.
    """

    default_exclude: tuple[str, ...] = ()
    timestep_names: tuple[str, ...] = ("timestep", "timesteps", "t", "sigma", "time")
    unbatched: tuple[str, ...] = ()
    block_classes: tuple[str, ...] = ()

    def is_attention(self, module: nn.Module) -> bool:
        """Whether a module computes attention, by torch's `scaled_dot_product_attention`."""
        return hasattr(module, "processor") and callable(getattr(module, "set_processor", None))

    def splits(self, network: nn.Module) -> dict[str, int]:
        """Channel index of the concatenation for each layer whose input is one; each half gets its own scales."""
        return {}

    def timestep_argument(self, network: nn.Module) -> tuple[str, int] | None:
        """Name and position of the argument that holds the time step; None if the network has none."""
        names = list(inspect.signature(network.forward).parameters)
        return next(((name, i) for i, name in enumerate(names) if name in self.timestep_names), None)


_PLAIN = NetworkFacts()
_FINDERS: list[Callable[[Any], NetworkFacts | None]] = []


def register_facts(find: Callable[[Any], NetworkFacts | None]) -> None:
    """Let `find` be asked before those that are registered already."""
    _FINDERS.insert(0, find)


def facts_of(network: Any) -> NetworkFacts:
    """What the first finder that knows a network says of it; the facts of a plain module if none does."""
    return next((facts for find in _FINDERS if (facts := find(network)) is not None), _PLAIN)
