"""What modiff hung on a model: the twins in place, the originals to put back, the clock and the hooks."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from modiff.errors import StateError
from modiff.model.report import Report
from modiff.nn import Clock, ModulatedLayer

ATTRIBUTE = "_modiff"
TIMESTEP_NAMES = ("timestep", "timesteps", "t", "sigma", "time")


class Attachment:
    """One per model with modulated layers; found with `attachment_of`."""

    def __init__(self, clock: Clock, report: Report) -> None:
        self.clock = clock
        self.report = report
        self.originals: dict[str, nn.Module] = {}
        self.twins: dict[str, ModulatedLayer] = {}
        self.handles: list[RemovableHandle] = []

    def watch(self, model: nn.Module) -> None:
        """Tell the clock of each evaluation of the model, its timestep, and its end, also when it raises."""
        names = [p for p in inspect.signature(model.forward).parameters]
        position = next((i for i, n in enumerate(names) if n in TIMESTEP_NAMES), None)

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.clock.call(_timestep(args, kwargs, None if position is None else names[position], position))

        def after(*_: object) -> None:
            self.clock.returned()

        self.handles.append(model.register_forward_pre_hook(before, with_kwargs=True))
        self.handles.append(model.register_forward_hook(after, always_call=True))


def _timestep(
    args: tuple[Any, ...], kwargs: dict[str, Any], name: str | None, position: int | None
) -> Tensor | float | None:
    if name is None or position is None:
        return None
    value = kwargs.get(name, args[position] if position < len(args) else None)
    return value if isinstance(value, (Tensor, float, int)) else None


def attachment_of(model: nn.Module) -> Attachment | None:
    """The attachment of a model, None if modiff was not applied to it."""
    return model.__dict__.get(ATTRIBUTE)


def required_attachment(model: nn.Module, verb: str) -> Attachment:
    """The attachment of a model. Raises: StateError if modiff was not applied to it."""
    attachment = attachment_of(model)
    if attachment is None:
        raise StateError(
            f"{verb}: expected a model with modulated layers, got a plain {type(model).__name__}. modiff was not "
            "applied to it, or was removed. Call modiff.apply(model, config) first."
        )
    return attachment
