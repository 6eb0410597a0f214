"""The clock of one trajectory: which step, which context, and who must forget when it ends."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from modiff.errors import StateError


class _Context:
    """What one context (conditional, unconditional, ...) has seen of the trajectory."""

    def __init__(self) -> None:
        self.step = -1
        self.timesteps: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)


class Clock:
    """Shared by all layers of one model.

    tick: counts network evaluations, over all contexts. step: evaluations of the present context in this trajectory,
    from 0. ratio: size of this step over the last one, in units of the timestep, 0-d tensor or 1.0 when unknown.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.active = False
        self.context = "default"
        self.tick = 0
        self.inside = False
        self._contexts: dict[str, _Context] = {}
        self._listeners: list[Callable[[], None]] = []

    def on_reset(self, forget: Callable[[], None]) -> None:
        """Register what frees a state; called when a trajectory starts, ends or raises."""
        self._listeners.append(forget)

    def start(self) -> None:
        """Begin a trajectory. Raises: StateError inside another one of the same model."""
        if self.active:
            raise StateError(
                f"{self.name}: expected no running trajectory, got a second one. Trajectories of one model cannot "
                "nest. Leave the first `with modiff.trajectory(model):` before the next."
            )
        self._forget()
        self.active = True

    def stop(self) -> None:
        """End the trajectory and free all states."""
        self.active = False
        self.context = "default"
        self._forget()

    def _forget(self) -> None:
        self._contexts.clear()
        for forget in self._listeners:
            forget()

    def call(self, timestep: Tensor | float | None) -> None:
        """A network evaluation begins; `timestep` is what the network was given, None if it has none."""
        if self.active:
            self.tick += 1
            self.inside = True
            context = self._contexts.setdefault(self.context, _Context())
            context.step += 1
            now = None if timestep is None else torch.as_tensor(timestep).detach().flatten()[:1].float()
            context.timesteps = (*context.timesteps[1:], now)

    def returned(self) -> None:
        """The network evaluation ended or raised."""
        self.inside = False

    @property
    def step(self) -> int:
        """Evaluations of the present context so far, the running one not counted."""
        return self._contexts[self.context].step

    @property
    def ratio(self) -> Tensor | float:
        """|t_now - t_last| / |t_last - t_before|, 1-element tensor, no host sync; 0 after a step of size 0."""
        before, last, now = self._contexts[self.context].timesteps
        if before is None or last is None or now is None:
            return 1.0
        size, previous = (now - last).abs(), (last - before).abs()
        return torch.where(previous > 0, size / previous.clamp_min(1e-12), torch.zeros_like(size))
