"""What modiff hung on a model: the quantized_layers in place, the originals to put back, the clock and the hooks."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from modiff.config import ModiffConfig
from modiff.errors import StateError
from modiff.model.report import Report
from modiff.nn import Clock, ModulatedLayer, traced
from modiff.nn.clock import middle

ATTRIBUTE = "_modiff"
TIMESTEP_NAMES = ("timestep", "timesteps", "t", "sigma", "time")


class Automatic:
    """Tells where one trajectory ends and the next begins, from the time steps alone.

    A model that diffusers loads from a quantized folder meets modiff nowhere else: its pipeline calls it, and no more.
    Time steps run one way through a trajectory. So the next one began where they turn round, or where the second is
    the first again (one-step trajectories). A trajectory that someone else began is left alone.

    A network without a time step keeps asking for `modiff.trajectory`. Cost: one host sync an evaluation.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.owns_trajectory = False
        self._seen: dict[str, list[float]] = {}

    def before(self, timestep: Tensor | float | None) -> None:
        """An evaluation begins: start a trajectory if this is its first."""
        if timestep is None or (self.clock.active and not self.owns_trajectory):
            return
        now = float(middle(timestep))
        if not self.owns_trajectory or self._reversed(self._seen.get(self.clock.context, []), now):
            context = self.clock.context
            self.end()
            self.clock.start()
            self.clock.context, self.owns_trajectory = context, True
        seen = self._seen.setdefault(self.clock.context, [])
        if not seen or seen[-1] != now:
            seen.append(now)
        del seen[:-2]

    def end(self) -> None:
        """The trajectory ended: free the states. Nothing happens where it is someone else's."""
        if self.owns_trajectory:
            self.clock.stop()
        self.owns_trajectory = False
        self._seen.clear()

    @staticmethod
    def _reversed(seen: list[float], now: float) -> bool:
        if len(seen) == 1:
            return now == seen[0]
        return len(seen) == 2 and (now - seen[1]) * (seen[1] - seen[0]) < 0


class Attachment:
    """One per model with modulated layers; found with `attachment_of`.

    config: as it was applied. packed: the originals are gone for good. automatic: begins trajectories where nobody
    else does; None where `modiff.trajectory` or a pipeline must.
    """

    def __init__(self, clock: Clock, report: Report, config: ModiffConfig | None = None) -> None:
        self.clock = clock
        self.report = report
        self.config = config or ModiffConfig()
        self.packed = False
        self.automatic: Automatic | None = None
        self.originals: dict[str, nn.Module] = {}
        self.layers: dict[str, ModulatedLayer] = {}
        self.handles: list[RemovableHandle] = []
        self.timestep: tuple[str, int] | None = None
        self.number = traced.number_for(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy has a number of its own."""
        self.__dict__.update(state)
        self.number = traced.number_for(self)

    def watch(self, model: nn.Module) -> None:
        """Tell the clock of each evaluation of the model, its timestep, and its end, also when it raises."""
        names = list(inspect.signature(model.forward).parameters)
        self.timestep = next(((n, i) for i, n in enumerate(names) if n in TIMESTEP_NAMES), None)
        # bound methods, not closures: copy.deepcopy of the model takes them to the copy's own clock
        self.handles.append(model.register_forward_pre_hook(self._before, with_kwargs=True))
        self.handles.append(model.register_forward_hook(self._after, always_call=True))

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = None
        if self.timestep is not None:
            name, position = self.timestep
            value = kwargs.get(name, args[position] if position < len(args) else None)
        timestep = value if isinstance(value, (Tensor, float, int)) else None
        if torch.compiler.is_compiling():
            given = None if timestep is None else torch.as_tensor(timestep)
            traced.begin(self.clock.token, given, self.number)
        else:
            self.begin(timestep)

    def begin(self, timestep: Tensor | float | None) -> None:
        """An evaluation of the model begins."""
        if self.automatic is not None:
            self.automatic.before(timestep)
        self.clock.call(timestep)

    def _after(self, _module: nn.Module, _args: object, output: object) -> None:
        if torch.compiler.is_compiling():
            traced.end(self.clock.token, self.number)
        elif output is None:  # what torch gives the hook when the module raised
            self.fail()
        else:
            self.end()

    def end(self) -> None:
        """The evaluation ended."""
        self.clock.returned()

    def fail(self) -> None:
        """The evaluation raised; a trajectory that began by itself is over."""
        self.clock.raised()
        if self.automatic is not None:
            self.automatic.end()


def eager(model: nn.Module) -> nn.Module:
    """The module behind one that torch.compile returned; any other as it is."""
    return getattr(model, "_orig_mod", model)


def attachment_of(model: nn.Module) -> Attachment | None:
    """The attachment of a model, also of one that torch.compile returned; None if modiff was not applied to it."""
    return eager(model).__dict__.get(ATTRIBUTE)


def required_attachment(model: nn.Module, verb: str) -> Attachment:
    """The attachment of a model. Raises: StateError if modiff was not applied to it."""
    attachment = attachment_of(model)
    if attachment is None:
        raise StateError(
            f"{verb}: expected a model with modulated layers, got a plain {type(model).__name__}. modiff was not "
            "applied to it, or was removed. Call modiff.apply(model, config) first."
        )
    return attachment
