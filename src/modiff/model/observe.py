"""See what the layers and the evaluations of a network compute, without changing what they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

OnLayer = Callable[[str, nn.Module, tuple[Any, ...], Any], object]
"""(name, layer, inputs, output); inputs by position, then those by keyword."""
OnStep = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], object]
"""(model, args, kwargs, output)"""
BeforeLayer = Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any]], object]
"""(name, layer, args, kwargs)"""
BeforeStep = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], object]
"""(model, args, kwargs)"""


@contextmanager
def observe(
    model: nn.Module,
    on_layer: OnLayer | None = None,
    on_step: OnStep | None = None,
    *,
    layers: Iterable[str] = (),
    before_layer: BeforeLayer | None = None,
    before_step: BeforeStep | None = None,
) -> Iterator[None]:
    """In the body, call functions around every call of the named layers and around every evaluation of the model.

    They are given the tensors that the network computes with: copy what you keep, change none. What they return is
    ignored, what they raise ends the evaluation. A call that raises has a `before` and no `on`. The functions are
    detached when the body ends, also by KeyboardInterrupt. Works under `torch.inference_mode`; graphs that
    torch.compile made before are not observed.

    Args:
        layers: names of modules of any kind; "" is the model.
    Raises: AttributeError for a name that the model does not have; nothing is attached then.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> with observe(net, lambda name, layer, inputs, output: print(name, tuple(output.shape)), layers=["0"]):
    ...     _ = net(torch.zeros(5, 2))
    0 (5, 3)
    """
    modules = {name: model.get_submodule(name) for name in layers}
    with ExitStack() as hooks:
        if before_step is not None:
            hooks.callback(model.register_forward_pre_hook(_silent(before_step), with_kwargs=True).remove)
        for name, module in modules.items():
            if before_layer is not None:
                before = _silent(before_layer, name)
                hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            if on_layer is not None:
                hooks.callback(module.register_forward_hook(_after(on_layer, name), with_kwargs=True).remove)
        if on_step is not None:
            hooks.callback(model.register_forward_hook(_silent(on_step), with_kwargs=True).remove)
        yield


def _silent(function: Callable[..., object], *first: str) -> Callable[..., None]:
    """A hook that returns nothing: torch would take what it returns for new inputs or outputs."""

    def hook(*args: Any) -> None:
        function(*first, *args)

    return hook


def _after(on_layer: OnLayer, name: str) -> Callable[..., None]:
    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        on_layer(name, layer, (*args, *kwargs.values()), output)

    return hook
