"""Cut a network into units of reconstruction: blocks learned as a whole, and single layers everywhere else."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from modiff.errors import ConfigError
from modiff.model.attach import attachment_of
from modiff.model.observe import observe
from modiff.nn import quantized_class
from modiff.nn.adapters import modules_of


@dataclass(frozen=True)
class Block:
    """One unit of reconstruction: a module's name and class, and the names of the layers inside, learned together.

    calls: how often one evaluation of the network runs it; None where that was not traced.
    """

    name: str
    kind: str
    layers: tuple[str, ...]
    calls: int | None = None


def blocks_of(
    model: nn.Module, *, kinds: Sequence[str] = (), patterns: Sequence[str] = (), layers: Iterable[str] | None = None,
    run: Callable[[], object] | None = None,
) -> list[Block]:  # fmt: skip
    """The units of a network: every layer belongs to exactly one.

    A layer belongs to the outermost module around it whose name matches `patterns`; failing that, to the outermost one
    whose class matches `kinds`; failing that, it is a unit of its own.

    Args:
        kinds, patterns: fnmatch patterns on class names and on module names.
        layers: names of the layers to be cut into units; the modulated ones, or all that could be, when None.
        run: evaluates the network once. The units are then in the order in which they finish, and those that never ran
            come last with 0 calls; without it, in the order of the modules.
    Raises: ConfigError for a pattern that matches no module with such a layer.
    """
    modules = modules_of(model)
    if layers is None:
        attachment = attachment_of(model)
        layers = [n for n, m in modules.items() if quantized_class(m)] if attachment is None else attachment.layers
    owners: dict[str, list[str]] = {}
    # the modules around each layer, outermost first, the layer itself last; not the network
    around = {name: list(itertools.accumulate(name.split("."), "{}.{}".format)) for name in layers}
    for name, outer in around.items():
        by_name = (m for m in outer if any(fnmatchcase(m, pattern) for pattern in patterns))
        by_kind = (m for m in outer if any(fnmatchcase(type(modules[m]).__name__, kind) for kind in kinds))
        owners.setdefault(next(itertools.chain(by_name, by_kind, (name,))), []).append(name)
    for pattern in patterns:
        if not any(fnmatchcase(module, pattern) for outer in around.values() for module in outer):
            raise ConfigError(
                f"blocks: expected patterns that match a module with layers to learn, got {pattern!r}. No such module "
                f"has this name. Known modules: {', '.join(list(modules)[1:9])}, ..."
            )
    blocks = [Block(owner, type(modules[owner]).__name__, tuple(inside)) for owner, inside in owners.items()]
    return blocks if run is None else _in_order_of_execution(model, blocks, run)


def _in_order_of_execution(model: nn.Module, blocks: list[Block], run: Callable[[], object]) -> list[Block]:
    """By the time of their first end: a unit inside another ends before it, and is learned before it."""
    calls: Counter[str] = Counter()
    with observe(model, lambda name, *_: calls.update([name]), layers=[block.name for block in blocks]):
        run()
    order = {name: i for i, name in enumerate(calls)}
    ranked = sorted(blocks, key=lambda block: order.get(block.name, len(order)))
    return [dataclasses.replace(block, calls=calls[block.name]) for block in ranked]
