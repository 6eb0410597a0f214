"""See what the layers and the evaluations of a network compute, without changing what they compute."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from modiff.nn.adapters import modules_of

Function = Callable[..., object]


def first_tensor(output: Any) -> Tensor:
    """The first tensor of what a network returned: in a tuple, a dictionary or an object, whatever its keys."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, (list, tuple)):
        values = list(output)
    else:
        values = list((output if isinstance(output, Mapping) else vars(output)).values())
    return next(value for value in values if isinstance(value, Tensor))


@contextmanager
def observe(
    model: nn.Module,
    on_layer: Function | None = None,
    on_step: Function | None = None,
    *,
    layers: Iterable[str] = (),
    before_layer: Function | None = None,
    before_step: Function | None = None,
) -> Iterator[None]:
    """In the body, call functions around every call of the named layers and around every evaluation of the model.

    They are given the tensors that the network computes with: copy what you keep, change none. What they return is
    ignored, what they raise ends the evaluation. Graphs made before by torch.compile are not observed.

    Args:
        layers: names of modules of any kind; "" is the model.
        on_layer: (name, layer, inputs, output); inputs by position, then those by keyword.
        on_step: (model, args, kwargs, output).
        before_layer: (name, layer, args, kwargs).
        before_step: (model, args, kwargs).
    Raises: AttributeError for a name that the model does not have; nothing is attached then.
    """
    known = modules_of(model)
    modules = {name: known[name] if name in known else model.get_submodule(name) for name in layers}
    with ExitStack() as hooks:

        def add(register: Callable[..., Any], function: Function | None, *first: str, merged: bool = False) -> None:
            def hook(*call: Any) -> None:  # torch would take what it returns for new inputs or outputs
                call = (call[0], (*call[1], *call[2].values()), call[3]) if merged else call
                function(*first, *call)  # type: ignore[misc]

            if function is not None:
                hooks.callback(register(hook, with_kwargs=True).remove)

        add(model.register_forward_pre_hook, before_step)
        for name, module in modules.items():
            add(module.register_forward_pre_hook, before_layer, name)
            add(module.register_forward_hook, on_layer, name, merged=True)
        add(model.register_forward_hook, on_step)
        yield
