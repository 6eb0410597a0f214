"""Adapters of other libraries on a model: which modules are theirs, and what the others are called without them."""

from collections.abc import Iterator, Mapping

from torch import nn

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
