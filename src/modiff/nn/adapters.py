"""Adapters of other libraries on a model: which modules are theirs, and what the others are called without them."""

import copy
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

_INSIDE = ("base_layer", "original_module")
"""Where PEFT's adapters keep the layer that they are put around."""


def walk(module: nn.Module, name: str = "", theirs: bool = False) -> Iterator[tuple[str, nn.Module, bool]]:
    """(name, module, whether it belongs to an adapter) of each module inside, at each place where it stands.

    A layer that an adapter was put around has the name that it has without the adapter. What PEFT puts next to it, the
    attention processors that hold layers, and IP-Adapter's projections belong to adapters.
    """
    yield name, module, theirs
    children = dict(module._modules.items())  # a scripted module has no dictionary of them
    inside = next((leaf for leaf in _INSIDE if children.get(leaf) is not None), None)
    for leaf, child in children.items():
        if child is not None and leaf == inside:
            yield from walk(child, name, theirs)
        elif child is not None:
            image = "IPAdapter" in type(child).__name__ or (leaf == "processor" and hasattr(module, "set_processor"))
            yield from walk(child, f"{name}.{leaf}" if name else leaf, theirs or inside is not None or image)


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by name; for a layer with an adapter around it, the layer."""
    return {name: module for name, module, _ in walk(model)}


def replace_modules(model: nn.Module, news: Mapping[nn.Module, nn.Module]) -> None:
    """Put new modules where old ones stand, inside of adapters too."""
    for parent in list(model.modules()):
        for leaf, child in list(parent._modules.items()):
            if child in news:
                setattr(parent, leaf, news[child])


def fused_adapter(model: nn.Module) -> str | None:
    """The name of a layer whose weight holds an adapter that can still be taken out of it."""
    wrappers = (n for n, m, _ in walk(model) if any(getattr(m, leaf, None) is not None for leaf in _INSIDE)
                and getattr(m, "merged", False) is True)  # fmt: skip
    return next(wrappers, None)


def adapter_on(model: nn.Module) -> str | None:
    """The name of a module with parameters that belongs to an adapter."""
    return next((n for n, m, theirs in walk(model) if theirs and next(m.parameters(), None) is not None), None)


def torch_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of torch that a modulated class extends."""
    return next(each for each in kind.__mro__ if not hasattr(each, "from_float"))


def torch_layer(layer: nn.Module, parameters: Mapping[str, Tensor | None], without: Collection[str] = ()) -> nn.Module:
    """The layer of torch that a modulated one stands for, packed or not, with other parameters."""
    kind: Any = torch_class(type(layer))
    plain = kind.__new__(kind)
    owned = {name: None if x is None else nn.Parameter(x, requires_grad=False) for name, x in parameters.items()}
    kept = {name: value for name, value in vars(layer).items() if name not in without}
    vars(plain).update(kept | {"_parameters": owned, "_buffers": {}, "_modules": {}})
    return plain


def copied(layer: Any, memo: dict[int, Any]) -> Any:
    """What `copy.deepcopy` makes of a modulated layer: without its model, as PEFT's `modules_to_save`, a plain one."""
    model = layer.clock.model and layer.clock.model()
    if model is None or id(model) in memo:
        return copy._reconstruct(layer, memo, *layer.__reduce_ex__(4))  # pyright: ignore
    floats = {name: x if x is None else x.detach() for name, x in (("weight", layer.weight), ("bias", layer.bias))}
    plain = torch_layer(layer, floats, ("clock", "config", "loop", "name", "number", "operator", "spec", "output_size"))
    memo[id(layer)] = plain = copy.deepcopy(plain, memo)
    return plain
