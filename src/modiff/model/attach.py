"""What modiff hung on a model: the layers in place, the originals to put back, the clock and the hooks."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from modiff.config import ModiffConfig, check
from modiff.core.step_sets import StepSizes
from modiff.errors import StateError, warn_once
from modiff.model.facts import facts_of
from modiff.model.report import Report, coded_values, execution_of, memory_of
from modiff.model.roles import NEVER, Roles, warn_unfit
from modiff.nn import Clock, ModulatedLayer, traced
from modiff.nn.branches import Inputs, conditions_of, inputs_of, main_of, moves
from modiff.nn.clock import middle

ATTRIBUTE = "_modiff"
_NOTHING = Inputs()
_BEGINNING = threading.Lock()
_ROUNDED = 0.25
"""Of the step before: an ancestral sampler that rounds its timesteps goes back by less."""


class Automatic:
    """Tells where one trajectory ends and the next begins, for a model that any pipeline may run.

    The next one began where timesteps turn round, where the second is the first again with the same inputs (one-step
    trajectories) or of another schedule (what interrupted the last one was told to nobody), where the call comes from
    another thread, and after an evaluation that raised. One that `modiff.trajectory` began is left alone.
    Cost: one host sync an evaluation.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.owns_trajectory = self._numbered = False
        self._thread = self._thread_before = 0
        self._seen: dict[str, list[float]] = {}
        self._schedule: torch.UntypedStorage | None = None  # alive, so that no other has its address

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_schedule": None}

    def before(self, timestep: Tensor | float | None, inputs: Inputs = _NOTHING) -> None:
        """An evaluation of these inputs begins: start a trajectory if this is its first."""
        if timestep is None or (self.clock.active and not self.owns_trajectory):
            return
        now, context, thread = float(middle(timestep)), self.clock.context, threading.get_ident()
        seen = self._seen.get(context, [])
        back = (seen[1] - now) / (seen[1] - seen[0]) if len(seen) == 2 else 0.0
        turned = back > _ROUNDED
        schedule, before = _schedule_of(timestep), self._schedule
        if schedule is not None and before is not None and seen == [now]:
            turned = schedule.data_ptr() != before.data_ptr()
        if not self.owns_trajectory or thread != self._thread or turned:
            if self.owns_trajectory and thread == self._thread_before != self._thread:
                warn_once(
                    f"threads of {self.clock.name}",
                    f"{self.clock.name}: expected one generation at a time, got evaluations of two threads in turn. "
                    "The states begin again with each change, so nothing is gained. Let requests wait in turn, or "
                    "give each a copy that shares the weights, modiff.clone(target).",
                )
            self.end()
            self.clock.start()
            self._numbered, self.clock.numbered = self.clock.numbered, True
            self.clock.context, self.owns_trajectory = context, True
            self._thread, self._thread_before, self._schedule = thread, self._thread, schedule
        elif seen == [now] and self.clock.knows(inputs):
            self.clock.again()
        seen = self._seen.setdefault(context, [])
        if not seen or (seen[-1] != now and back <= 0):
            seen.append(now)
        del seen[:-2]

    def end(self) -> None:
        """The trajectory ended: free its states, if it began here."""
        if self.owns_trajectory:
            self.clock.stop()
            self.clock.numbered = self._numbered
        self.owns_trajectory, self._schedule = False, None
        self._seen.clear()


def _schedule_of(timestep: Tensor | float) -> torch.UntypedStorage | None:
    """What holds the timesteps of all steps, where this one is a view of it, as schedulers give them."""
    storage = timestep.untyped_storage() if isinstance(timestep, Tensor) else None
    return None if storage is None or storage.nbytes() <= timestep.nbytes else storage


class Attachment:
    """One per model with modulated layers.

    packed: the originals are gone for good. automatic: begins trajectories, where neither `modiff.trajectory` nor a
    pipeline does. step_sizes: that static scales were measured with. roles: of the layers, until the first trajectory
    has shown them. uncalled: layers that did not run in it. unfit: those that should keep their floats, and why.
    """

    def __init__(self, clock: Clock, report: Report, config: ModiffConfig | None = None) -> None:
        self.clock = clock
        clock.on_reset(self._trajectory_ended)  # before the layers', which forget their states
        self.selected = report
        self.config = config or ModiffConfig()
        self.packed = False
        self.automatic: Automatic | None = None
        self.originals: dict[str, nn.Module] = {}
        self.layers: dict[str, ModulatedLayer] = {}
        self.handles: list[RemovableHandle | SimpleNamespace] = []
        self.step_sizes = StepSizes()
        self.timestep: tuple[str, int] | None = None
        self.branch_hooks: Callable[[], tuple[str, ...]] | None = None
        self.thread = 0
        self.most_states = 0
        self.expected_states: int | None = None
        self.roles: Roles | None = None
        self.uncalled: tuple[str, ...] = ()
        self.unfit: dict[str, str] = {}
        self.number = traced.number_for(self)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"branch_hooks": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.number = traced.number_for(self)  # a copy has another

    @property
    def report(self) -> Report:
        """The layers as they run now. Cost: on integers, a choice of backend for each layer."""
        entries = list(self.selected.entries)
        for i, entry in enumerate(entries):
            if entry.name in self.uncalled:
                entries[i] = dataclasses.replace(entry, reason=NEVER, execution="not run")
            elif (layer := self.layers.get(entry.name)) is not None:
                (execution, why), reason = execution_of(layer), entry.reason
                if layer.quantizer is not None and layer.quantizer.of_values:
                    reason = ", ".join(filter(None, [reason, coded_values(layer.quantizer)]))
                entries[i] = dataclasses.replace(
                    entry, reason=reason, execution=execution, why=why, anchor=layer.anchors_with,
                    states=layer.loop.state_dtype if layer.inputs is not None else "",
                )  # fmt: skip
        return Report(tuple(entries), memory_of(self.layers.values(), self.most_states, self.expected_states))

    @property
    def in_trajectory(self) -> bool:
        """Whether a trajectory runs that did not begin by itself."""
        return self.clock.active and not (self.automatic is not None and self.automatic.owns_trajectory)

    def state_bytes(self) -> int:
        """Of all states, of all contexts; a state that layers share counts once."""
        tensors = (t for layer in self.layers.values() for t in layer.loop.tensors())
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    def _trajectory_ended(self) -> None:
        self.most_states = max(self.most_states, self.state_bytes())
        if self.roles is not None and self.roles.evaluated:
            self._learn(self.roles)

    def _learn(self, roles: Roles) -> None:
        for name, layer in self.layers.items():  # of compiled ones the states tell
            if layer.inputs is not None and not layer.loop.memories:
                roles.unseen.discard(name)
        self.roles, unfit = None, roles.unfit()
        self.uncalled = tuple(name for name, why in unfit.items() if why == NEVER)
        self.unfit = {name: why for name, why in unfit.items() if why != NEVER}
        warn_unfit(self.clock.name, unfit, "Add their names to ModiffConfig(exclude=...), or to include.")

    def watch(self, model: nn.Module) -> None:
        """Tell the clock of each evaluation of the model, its timestep, and its end, also when it raises."""
        self.timestep, self.clock.model = facts_of(model).timestep_argument(model), weakref.ref(model)
        # bound methods, not closures: copy.deepcopy of the model takes them to the copy's own clock
        self.handles.append(model.register_forward_pre_hook(self._before, with_kwargs=True))
        self.handles.append(model.register_forward_hook(self._after))
        self.handles.append(model.register_forward_hook(self._raised, always_call=True))
        for module in model.modules():  # torch's fast path reads weights itself; a hook on a layer keeps it from that
            if isinstance(module, nn.TransformerEncoderLayer):
                self.handles.append(module.register_forward_hook(_nothing))
            elif isinstance(module, nn.TransformerEncoder):
                undo = partial(setattr, module, "use_nested_tensor", module.use_nested_tensor)
                self.handles.append(SimpleNamespace(remove=undo))
                module.use_nested_tensor = False

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name, position = self.timestep or ("", len(args))
        value = kwargs.get(name, args[position] if position < len(args) else None)
        timestep = value if isinstance(value, (Tensor, float, int)) else None
        sample = sample_of(args, kwargs)
        if torch.compiler.is_compiling():
            moment = None if timestep is None else torch.as_tensor(timestep)
            tensors, plain = conditions_of(args, kwargs, sample, self.timestep)
            names = [*tensors, *(f"{name}={value!r}" for name, value in plain.items() if not moves(value))]
            main = main_of(args, kwargs) if sample is None else sample
            traced.begin(self.clock.token, moment, main, list(tensors.values()), names, self.number)
        else:
            traced.check_no_transform(self.clock.name)
            self.clock.model = weakref.ref(model)
            if self.branch_hooks is None:
                self.branch_hooks = partial(facts_of(model).branch_hooks, [*model.modules()])
            if hooks := self.branch_hooks():
                kwargs = {**kwargs, "hooks": hooks}
            self.begin(timestep, inputs_of(args, kwargs, sample, self.timestep))
            if self.roles is not None:
                self.roles.begin(model, sample)

    def begin(self, timestep: Tensor | float | None, inputs: Inputs = _NOTHING) -> None:
        """An evaluation of the model begins. Raises: StateError while another thread is in one."""
        with _BEGINNING:
            if self.clock.inside:  # the one before did not end: torch tells hooks of an Exception, not of Ctrl-C
                self._refuse_other_thread()
                self.fail()
            self.thread = threading.get_ident()
            if self.automatic is not None:
                self.automatic.before(timestep, inputs)
            self.clock.call(timestep, inputs)
            self._look_at_weights()
            if self.step_sizes.matter and (size := self.clock.step_size()) is not None:
                self.step_sizes.see(self.clock.name, size)

    def _look_at_weights(self) -> None:
        """Let one layer, in turn, compare the bytes of its weight; all of them where one had changed."""
        layers, changed = [*self.layers.values()], self.clock.weights_changed
        self.clock.weights_changed = False
        turn = self.clock.tick % max(1, len(layers))
        if any(layer.operator.look() for layer in layers[turn : turn + 1]) or changed:
            for layer in layers:
                layer.operator.look()

    def _refuse_other_thread(self) -> None:
        if self.thread != threading.get_ident() and any(t.ident == self.thread for t in threading.enumerate()):
            raise StateError(
                f"{self.clock.name}: expected one evaluation at a time, got one while another thread is in one. The "
                "states of a model belong to one trajectory. Give each thread a copy that shares the weights, "
                "modiff.clone(target), or let them wait for each other; if the other evaluation was interrupted, begin "
                "with modiff.trajectory(model)."
            )

    def _after(self, *_: object) -> None:
        if torch.compiler.is_compiling():
            traced.end(self.clock.token, self.number)
        else:
            self.end()

    def _raised(self, *_: object) -> None:
        """Runs after `_after`, and alone where the model raised."""
        if not torch.compiler.is_compiling() and self.clock.inside and self.thread == threading.get_ident():
            self.fail()

    def end(self) -> None:
        """The evaluation ended."""
        self.clock.returned()
        if self.roles is not None:
            self.roles.close()
            if not self.clock.active or self.roles.taken <= self.roles.rows.keys():
                self._learn(self.roles)

    def fail(self) -> None:
        """The evaluation did not reach its end; a trajectory that began by itself is over."""
        self.clock.raised()
        if self.roles is not None:
            self.roles.close()
            self.roles = Roles(self.config, self.selected)
        if self.automatic is not None:
            self.automatic.end()


def _nothing(*_: object) -> None:
    pass


def eager(model: nn.Module) -> nn.Module:
    """The module behind one that torch.compile or PEFT returned; any other as it is."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(type(model), "get_base_model") else model


def sample_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The sample of a network: the first float tensor with a batch that is no column of times, if there is another."""
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point() and v.dim() > 1]
    return next((x for x in tensors if x.numel() > len(x)), next(iter(tensors), None))


def attachment_of(model: nn.Module) -> Attachment | None:
    """The attachment of a model; None if modiff was not applied to it."""
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


def check_plain(model: nn.Module, verb: str, why: str) -> None:
    """Raise the StateError of a model that carries modiff already."""
    if attachment_of(model) is not None:
        raise StateError(f"{verb}: expected a plain model, got {type(model).__name__} with modulated layers. {why}")


def check_searchable(models: Sequence[nn.Module], config: ModiffConfig, verb: str) -> None:
    """Raise the StateError of a model that carries modiff, or the ConfigError of settings without codes to judge."""
    for model in models:
        check_plain(model, verb, "It is judged against full precision. Call modiff.remove(model) first.")
    bits = config.layer.activation.bits
    where = verb if verb == "tune" else f"{verb}.config"  # tune is given bits apart from its config
    check(where, bits, bits not in (None, 0), "2 to 8 activation bits", "Without codes there is nothing to choose.")
