"""The clock of one trajectory: which step, which context, and who must forget when it ends."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from modiff.errors import StateError

_STARTING = threading.Lock()
"""Of two threads that start a trajectory of one model, one must see that the other did; one lock for all models, as
clocks are copied with them."""


def middle(timestep: Tensor | float) -> Tensor:
    """The timestep of an evaluation, (1,), float32: half of the least and the greatest, exact where they are one.

    Image-to-video pipelines give each token its own, and hold those of the first frame at 0 all along.
    """
    low, high = torch.as_tensor(timestep, dtype=torch.float32).detach().aminmax()
    return ((low + high) / 2).reshape(1)


class _Context:
    """What one context (conditional, unconditional, ...) has seen of the trajectory.

    times: the last three timesteps, (3,), moved up in place, so that a recorded step reads the present ones.
    known: which of them were given.
    """

    def __init__(self) -> None:
        self.step = -1
        self.times: Tensor | None = None
        self.known = (False, False, False)

    def move(self, now: Tensor | None) -> None:
        """The next evaluation begins; `now` is its timestep, (1,)."""
        self.step += 1
        if now is not None and (self.times is None or self.times.device != now.device):
            with torch.inference_mode(mode=False):
                self.times = torch.zeros(3, dtype=torch.float32, device=now.device)
            self.known = (False, False, False)
        self.known = (*self.known[1:], now is not None)
        if self.times is not None and now is not None:
            self.times.copy_(torch.cat([self.times[1:], now]))
        elif self.times is not None:
            self.times.copy_(self.times.roll(-1))


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
        self.failed = False
        with torch.inference_mode(mode=False):
            self.token = torch.zeros(1, device="cpu")  # graphs write into it to keep their operators in order
        self._given: Tensor | float | None = None
        self._moment: tuple[float, ...] | None = None
        self._contexts: dict[str, _Context] = {}
        self._listeners: list[Callable[[], None]] = []

    def on_reset(self, forget: Callable[[], None]) -> None:
        """Register what frees a state; called when a trajectory starts, ends or raises."""
        self._listeners.append(forget)

    def start(self) -> None:
        """Begin a trajectory. Raises: StateError inside another one of the same model, also one of another thread."""
        with _STARTING:
            if self.active:
                raise StateError(
                    f"{self.name}: expected no running trajectory, got a second one. Trajectories of one model cannot "
                    "nest. Leave the first `with modiff.trajectory(model):` before the next."
                )
            self._forget()
            self.active, self.inside, self.failed = True, False, False

    def stop(self) -> None:
        """End the trajectory and free all states."""
        with _STARTING:
            self.active = self.inside = self.failed = False
            self.context = "default"
            self._forget()

    def _forget(self) -> None:
        self._contexts.clear()
        for forget in self._listeners:
            forget()

    def call(self, timestep: Tensor | float | None) -> None:
        """A network evaluation begins; `timestep` is what the network was given, None if it has none.

        Raises: StateError if the one before raised inside this trajectory.
        """
        if self.failed:
            raise StateError(
                f"{self.name}: expected a trajectory whose evaluations all ended, got one whose last evaluation "
                "raised. Some layers hold states of that step and some of the step before. Begin the trajectory again."
            )
        self._given, self._moment = timestep, None
        if self.active:
            self.tick += 1
            self.inside = True
            context = self._contexts.setdefault(self.context, _Context())
            now = None if timestep is None else middle(timestep)
            context.move(now)

    def returned(self) -> None:
        """The network evaluation ended."""
        self.inside = False

    def raised(self) -> None:
        """The network evaluation raised: the states of its layers may be of two steps."""
        self.inside, self.failed = False, self.active

    def moment(self) -> tuple[float]:
        """(timestep,) of this evaluation: what scales per step of a plain layer are kept under.

        Raises: StateError if the network was given no timestep, or several at once. Cost: one host sync an evaluation.
        """
        if self._moment is None:
            values = torch.as_tensor(torch.nan if self._given is None else self._given).detach().flatten().double()
            if not bool((values == values[0]).all()):
                raise StateError(
                    f"{self.name}: expected one timestep for the whole batch, got "
                    f"{'none' if self._given is None else 'several'}. Scales per step are chosen by it. "
                    "Evaluate one step at a time, or use step_groups=1."
                )
            self._moment = (float(values[0]),)
        return (self._moment[0],)

    def transition(self) -> tuple[float, float]:
        """(timestep, timestep before) of the present context: what scales per step of residuals are kept under.

        Raises: StateError as `moment` does, and at the first step, which has no residual.
        """
        context = self._contexts[self.context]
        if context.times is None or not context.known[1]:
            raise StateError(
                f"{self.name}: expected a step before this one, got the first of the trajectory. A residual needs "
                "two. Use first_step='full_precision'."
            )
        return (*self.moment(), float(context.times[1]))

    def step_size(self) -> float | None:
        """|t_now - t_last| of the present context; None at its first step, or without timesteps. Cost: a host sync."""
        context = self._contexts.get(self.context)
        if context is None or context.times is None or not all(context.known[1:]):
            return None
        return float((context.times[2] - context.times[1]).abs())

    def times(self) -> list[Tensor]:
        """The last timesteps of each context, which a recorded step reads."""
        return [context.times for context in self._contexts.values() if context.times is not None]

    @property
    def step(self) -> int:
        """Evaluations of the present context so far, the running one not counted."""
        return self._contexts[self.context].step

    @property
    def ratio(self) -> Tensor | float:
        """|t_now - t_last| / |t_last - t_before|, 1-element tensor, no host sync; 0 after a step of size 0."""
        context = self._contexts[self.context]
        if context.times is None or not all(context.known):
            return 1.0
        before, last, now = context.times.split(1)
        size, previous = (now - last).abs(), (last - before).abs()
        return torch.where(previous > 0, size / previous.clamp_min(1e-12), torch.zeros_like(size))
