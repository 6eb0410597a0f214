"""Cut a network into units of reconstruction: blocks learned as a whole, and single layers everywhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from modiff.errors import ConfigError
from modiff.model.attach import attachment_of
from modiff.nn import quantized_class


@dataclass(frozen=True)
class Block:
    """One unit of reconstruction: a module of the network and the layers inside whose weights are learned together.

    name: of the module. kind: its class name. layers: full names, in the order of the modules; none is in two units.
    calls: how often one evaluation of the network runs it; None where that was not traced.
    """

    name: str
    kind: str
    layers: tuple[str, ...]
    calls: int | None = None


def blocks_of(
    model: nn.Module,
    *,
    kinds: Sequence[str] = (),
    patterns: Sequence[str] = (),
    layers: Iterable[str] | None = None,
    run: Callable[[], object] | None = None,
) -> list[Block]:
    """The units of a network: every layer belongs to exactly one.

    A layer belongs to the outermost module around it whose name matches `patterns`; failing that, to the outermost one
    whose class matches `kinds`; failing that, it is a unit of its own.

    Args:
        kinds: fnmatch patterns on class names, such as "ResnetBlock2D" or "*TransformerBlock".
        patterns: fnmatch patterns on module names, of the user.
        layers: names of the layers to be cut into units; the modulated ones, or all that could be, when None.
        run: evaluates the network once. The units are then in the order in which they finish, which is the order of
            execution, and those that never ran come last with 0 calls; without it, in the order of the modules.
    Raises: ConfigError for a pattern that matches no module with such a layer.
    Cost: one evaluation, if `run` is given.
    """
    modules = dict(model.named_modules())
    names = _layers_of(model) if layers is None else list(layers)
    owners: dict[str, list[str]] = {}
    for name in names:
        owners.setdefault(_owner(name, modules, kinds, patterns), []).append(name)
    _check_patterns(patterns, names, modules)
    found = [Block(owner, type(modules[owner]).__name__, tuple(inside)) for owner, inside in owners.items()]
    return found if run is None else _in_order_of_execution(found, modules, run)


def _layers_of(model: nn.Module) -> list[str]:
    attachment = attachment_of(model)
    if attachment is not None:
        return list(attachment.layers)
    return [name for name, module in model.named_modules() if quantized_class(module) is not None]


def _owner(name: str, modules: dict[str, nn.Module], kinds: Sequence[str], patterns: Sequence[str]) -> str:
    around = _around(name)
    for module in around:
        if any(fnmatchcase(module, pattern) for pattern in patterns):
            return module
    for module in around:
        if any(fnmatchcase(type(modules[module]).__name__, kind) for kind in kinds):
            return module
    return name


def _around(name: str) -> list[str]:
    """The modules around a layer, outermost first, the layer itself last; not the network."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _check_patterns(patterns: Sequence[str], names: list[str], modules: dict[str, nn.Module]) -> None:
    around = {module for name in names for module in _around(name)}
    for pattern in patterns:
        if not any(fnmatchcase(module, pattern) for module in around):
            known = ", ".join(list(modules)[1:9])
            raise ConfigError(
                f"blocks: expected patterns that match a module with layers to learn, got {pattern!r}. No such module "
                f"has this name. Known modules: {known}, ..."
            )


def _in_order_of_execution(
    blocks: list[Block], modules: dict[str, nn.Module], run: Callable[[], object]
) -> list[Block]:
    """By the time of their first end: a unit inside another ends before it, and is learned before it."""
    calls: dict[str, int] = {}

    def count(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls[name] = calls.get(name, 0) + 1

        return hook

    handles = [modules[block.name].register_forward_hook(count(block.name)) for block in blocks]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    order = {name: i for i, name in enumerate(calls)}
    ranked = sorted(blocks, key=lambda block: order.get(block.name, len(order)))
    return [Block(b.name, b.kind, b.layers, calls.get(b.name, 0)) for b in ranked]
