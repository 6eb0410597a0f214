"""The clock of one trajectory: which step, which context, and who must forget when it ends."""

import copy
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from modiff.errors import StateError, warn_once
from modiff.nn.branches import Branches, Fork, Inputs

_STARTING = threading.Lock()  # one for all models, as clocks are copied with them


def middle(timestep: Tensor | float) -> Tensor:
    """The timestep of an evaluation, (1,), float32: half of the least and the greatest, exact where they are one.

    Image-to-video pipelines give each token its own, and keep those of the first frame at 0.
    """
    low, high = torch.as_tensor(timestep, dtype=torch.float32).detach().aminmax()
    return ((low + high) / 2).reshape(1)


class _Context:
    """What one context (conditional, unconditional, ...) has seen of the trajectory.

    times: the last three timesteps, (3,), moved up in place, so that a recorded step reads the present ones.
    known: how many of the last evaluations had one.
    """

    def __init__(self) -> None:
        self.step, self.known = -1, 0
        self.times: Tensor | None = None

    def move(self, now: Tensor | None) -> None:
        """The next evaluation begins; `now` is its timestep, (1,)."""
        self.step += 1
        if now is None:
            self.known = 0
            return
        if self.times is None or self.times.device != now.device:
            with torch.inference_mode(mode=False):
                self.times = torch.zeros(3, dtype=torch.float32, device=now.device)
            self.known = 0
        self.known += 1
        self.times.copy_(torch.cat([self.times[1:], now]))


class Clock:
    """Shared by all layers of one model.

    tick: counts network evaluations, over all contexts, in trajectories and outside. step: those of the present context
    in this trajectory, from 0. ratio: size of this step over the last one, in units of the timestep, 0-d tensor or 1.0
    when unknown.
    inside, running: whether an evaluation runs in the trajectory, or anywhere.
    weights_changed: whether a layer found that its weight changed.
    numbered: also evaluations with the same inputs at one timestep have their own states, as tiles need; a host whose
    timesteps move sets it. names_tell: of an evaluation's conditions only the name of the context counts.
    kept: while scales are measured: how much of the errors of earlier steps this sample still has, 0 to 1.
    """

    def __init__(self, name: str) -> None:
        self.name, self.context, self.tick, self.kept = name, "default", 0, 1.0
        self.active = self.inside = self.failed = self.numbered = self.names_tell = self.weights_changed = False
        self.running = False
        with torch.inference_mode(mode=False):
            self.token = torch.zeros(1, device="cpu")  # graphs write into it to keep their operators in order
        self.model: weakref.ref[nn.Module] | None = None  # since its last evaluation; copies learn of theirs
        self._timestep: Tensor | float | None = None
        self._moment: tuple[float] | None = None
        self._contexts: dict[str, _Context] = {}
        self._branches: dict[str, Branches] = {}
        self.fork: Fork | None = None  # of an evaluation of rows that were in another context
        self._named: str | None = None  # the context that an evaluation of a branch returns to
        self._listeners: list[Callable[[], None]] = []

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"model": None}

    def on_reset(self, forget: Callable[[], None]) -> None:
        """Register what frees a state; called when a trajectory starts, ends or raises."""
        self._listeners.append(forget)

    def start(self) -> None:
        """Begin a trajectory. Raises: StateError inside another one of the same model, also one of another thread."""
        with _STARTING:
            if self.active:
                raise StateError(
                    f"{self.name}: expected no running trajectory, got a second one. The states of a model belong to "
                    "one generation at a time. Leave the first `with modiff.trajectory(model):` before the next; for "
                    "requests at the same time give each a copy that shares the weights, modiff.clone(target)."
                )
            self._forget()
            self.active, self.inside, self.failed, self.running = True, False, False, False

    def stop(self) -> None:
        """End the trajectory and free all states."""
        with _STARTING:
            self.active = self.inside = self.failed = self.names_tell = self.running = False
            self.context, self._named = "default", None
            self._forget()

    def _forget(self) -> None:
        self._contexts.clear()
        self._branches.clear()
        for forget in self._listeners:
            forget()

    def again(self) -> None:
        """The first timestep came again, with the same inputs: a tile, or another trajectory of one step."""
        branches, self._branches = self._branches, {}
        self._forget()
        self._branches = branches
        for known in branches.values():
            known.uncertain = True

    def knows(self, inputs: Inputs) -> bool:
        """Whether an evaluation of the present context had these inputs."""
        return self.context in self._branches and self._branches[self.context].knows(inputs)

    def call(self, timestep: Tensor | float | None, inputs: Inputs | None = None) -> None:
        """A network evaluation begins; `timestep` is what the network was given, None if it has none.

        Evaluations whose `inputs` differ have states of their own. Cost: a host sync, where they are numbered.
        Raises: StateError if the one before raised inside this trajectory.
        """
        if self.failed:
            raise StateError(
                f"{self.name}: expected a trajectory whose evaluations all ended, got one whose last evaluation "
                "raised. Some layers hold states of that step and some of the step before. Begin the trajectory again."
            )
        self._timestep, self._moment = timestep, None
        self.running, self.tick = True, self.tick + 1
        if self.active:
            self.inside = True
            now = None if timestep is None else middle(timestep)
            if self.numbered or inputs is not None:
                self._enter_branch(now, inputs or Inputs())
            self._contexts.setdefault(self.context, _Context()).move(now)

    def returned(self) -> None:
        """The network evaluation ended."""
        self.inside = self.running = False
        self._leave_branch()

    def raised(self) -> None:
        """The network evaluation raised: the states of its layers may be of two steps."""
        self.inside, self.running, self.failed = False, False, self.active
        self._leave_branch()

    def _enter_branch(self, timestep: Tensor | None, inputs: Inputs) -> None:
        self._leave_branch()  # of an evaluation that never ended
        name, known = self.context, self._branches.get(self.context)
        now = float("nan")  # without a timestep, or a host sync, every evaluation is a step
        if timestep is None:  # the words and masks that a text model fills in are no conditions
            inputs = inputs.of_floats()
        elif self.numbered or timestep.device.type == "cpu":
            now = float(timestep)
        inputs = Inputs(inputs.shape) if self.names_tell else inputs
        if known is not None and known.ended(now if self.numbered else float("nan")):
            self._forget()  # another generation
        branches = self._branches.setdefault(name, Branches(name))
        branch, regular = branches.number(now, inputs, ordered=self.numbered)
        if not regular:
            warn_once(
                f"branches of {self.name}",
                f"{self.name}: expected as many evaluations at each timestep as at the first, two at most in a loop of "
                f"yours, got another number under the same conditions at timestep {now} or before it. Evaluations of "
                "different inputs may share a state, which costs quality. Put each into `with "
                "modiff.context(model, name):`.",
            )
        if branch:
            self._named, self.context = name, branches.context(branch)
        self.fork = branches.fork
        if self.fork is not None and self.fork.context in self._contexts:
            self._contexts[self.context] = copy.deepcopy(self._contexts[self.fork.context])

    def _leave_branch(self) -> None:
        self.fork = None
        if self._named is not None:
            self.context, self._named = self._named, None

    def reorder(self, index: Tensor) -> None:
        """Row i of the conditions seen so far is that of row index[i], so that evaluations with such rows go on."""
        for branches in self._branches.values():
            for kind in branches.kinds:
                kind.inputs = kind.inputs.reordered(index)

    def moment(self) -> tuple[float]:
        """(timestep,) of this evaluation, the key of a plain layer's scales per step.

        Raises: StateError if the network has no timestep, or several at once. Cost: one host sync an evaluation.
        """
        if self._moment is None:
            timestep = torch.nan if self._timestep is None else self._timestep
            values = torch.as_tensor(timestep).detach().flatten().double()
            if not bool((values == values[0]).all()):  # NaN equals nothing
                raise StateError(
                    f"{self.name}: expected one timestep for the whole batch, got "
                    f"{'none' if self._timestep is None else 'several'}. Scales per step are chosen by it. "
                    "Evaluate one step at a time, or use step_groups=1."
                )
            self._moment = (float(values[0]),)
        return self._moment

    def transition(self) -> tuple[float, float]:
        """(timestep, the one before) of the present context, the key of a residual's scales per step.

        Raises: StateError as `moment` does, and at the first step, which has no residual.
        """
        context = self._contexts[self.context]
        if context.times is None or context.known < 2:
            raise StateError(
                f"{self.name}: expected a step before this one, got the first of the trajectory. A residual needs "
                "two. Use first_step='full_precision'."
            )
        return (*self.moment(), float(context.times[1]))

    def step_size(self) -> float | None:
        """|t_now - t_last| of the present context; None at its first step, or without timesteps. Cost: a host sync."""
        context = self._contexts.get(self.context)
        if context is None or context.times is None or context.known < 2:
            return None
        return float((context.times[2] - context.times[1]).abs())

    @property
    def step(self) -> int:
        """Evaluations of the present context so far, the running one not counted."""
        return self._contexts[self.context].step

    @property
    def ratio(self) -> Tensor | float:
        """|t_now - t_last| / |t_last - t_before|, 1-element tensor, no host sync; 0 after a step of size 0."""
        context = self._contexts[self.context]
        if context.times is None or context.known < 3:
            return 1.0
        before, last, now = context.times.split(1)
        size, previous = (now - last).abs(), (last - before).abs()
        return torch.where(previous > 0, size / previous.clamp_min(1e-12), torch.zeros_like(size))
