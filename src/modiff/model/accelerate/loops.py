"""Trajectories of a target while it is searched: their times, evaluation by evaluation, and their results."""

import dataclasses
import functools
import inspect
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from modiff.config import ModiffConfig, check
from modiff.errors import ConfigError, warn_once
from modiff.model.accelerate.settings import Choice, Tried
from modiff.model.attach import required_attachment, sample_of
from modiff.model.report import Report
from modiff.model.trajectory import clone
from modiff.nn.fusion import backend
from modiff.progress import Bar

MODIFF, FLOATS = "modiff", "floats"
ROUNDS, SECONDS = 5, 30.0
"""Of a race: the most of them, and after how many seconds there are no more than two."""
_FREEZING = {"freezing": True}
Around = Callable[[], AbstractContextManager[object]]


class Watch:
    """Stands where torch keeps the compiled call of a network: runs it, and takes the time of each evaluation.

    run: the network itself, a compiled one, or its floats. last: the sample that it read last, and its output.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network, self.run = network, network._call_impl
        self.seconds: list[float] = []
        self.last: list[Tensor] = []

    @functools.wraps(nn.Module._call_impl)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One evaluation."""
        wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
        wait()
        start = time.perf_counter()
        output = self.run(*args, **kwargs)
        wait()
        self.seconds.append(time.perf_counter() - start)
        self.last = arrays(sample_of(args, kwargs)) + arrays(output)
        return output


@contextmanager
def watched(networks: Sequence[nn.Module]) -> Iterator[list[Watch]]:
    """A watch on each network while the body runs. Raises: ConfigError for one that is compiled."""
    for network in networks:
        if any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in network.modules()):
            raise ConfigError(
                f"accelerate: expected a network that is not compiled, got {type(network).__name__} with a compiled "
                "call. It is compiled here, when its layers are chosen. Give it before .compile()."
            )
    watches = [Watch(network) for network in networks]
    try:
        for watch in watches:
            watch.network._compiled_call_impl = watch
        yield watches
    finally:
        for watch in watches:
            watch.network._compiled_call_impl = None


def arrays(value: Any) -> list[Tensor]:
    """The first array, or list of PIL images, in what a run returns; in float64."""
    if hasattr(value, "getbands"):
        value = np.asarray(value) / 255
    if isinstance(value, (Tensor, np.ndarray)):
        return [torch.as_tensor(value).detach().cpu().double()]
    inner = list(value.values()) if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    if inner and all(hasattr(each, "getbands") for each in inner):
        return [torch.stack([arrays(each)[0] for each in inner])]
    return next((tensors for each in inner if (tensors := arrays(each))), [])


def difference(ours: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """||ours - exact|| / ||exact||, the largest of all pairs; infinite for other shapes and for what is not finite."""
    pairs = list(zip(ours, exact, strict=False))
    alike = len(ours) == len(exact) > 0 and all(a.shape == b.shape for a, b in pairs)
    errors = [float((a - b).norm() / b.norm()) for a, b in pairs] if alike else [math.inf]
    return max(error if math.isfinite(error) else math.inf for error in errors)


def call_of(target: Any, method: str, arguments: Mapping[str, Any]) -> Callable[[], object]:
    """Calls a method of the target, each time with these arguments and the same noise.

    Raises: ConfigError for a target without a method that runs a trajectory.
    """
    why = f"A call of {type(target).__name__} runs no whole trajectory. Give example=lambda: ..., your sampling loop."
    known = bool(method) and isinstance(arguments, Mapping)
    check("accelerate.example", arguments, known, "a function that runs one trajectory, or a pipeline's arguments", why)
    values = [x for value in arguments.values() for x in (value if isinstance(value, list) else [value])]
    states = [(g, g.get_state()) for g in values if isinstance(g, torch.Generator)]
    exact = {"output_type": "np"} if "output_type" in inspect.signature(getattr(target, method)).parameters else {}

    def run() -> object:
        for generator, state in states:
            generator.set_state(state)
        return getattr(target, method)(**{**exact, **arguments})

    return run


@dataclasses.dataclass
class Trials:
    """A target while it is searched.

    run: one trajectory. apply, remove: put a config on the target, and take it off. within: what a trajectory needs
    around it with modiff on the target, contexts: without. splits: of each network.
    """

    networks: Sequence[nn.Module]
    run: Callable[[], object]
    apply: Callable[[ModiffConfig], Report]
    remove: Callable[[], None]
    within: Around = nullcontext
    contexts: Around = nullcontext
    splits: Sequence[Mapping[str, int]] = ()
    bar: Bar = dataclasses.field(default_factory=lambda: Bar(shown=False))
    watches: list[Watch] = dataclasses.field(default_factory=list)

    def trajectory(self, title: str, around: Around = nullcontext) -> list[Tensor]:
        """What the example returned, else what the networks read and gave last. `watches` hold the seconds."""
        self.bar.set_description(title)
        for watch in self.watches:
            watch.seconds = []
        with torch.random.fork_rng(), torch.no_grad(), around():
            torch.manual_seed(0)
            result = arrays(self.run())
        self.bar.update()
        return result or [x for watch in self.watches for x in watch.last]

    def seconds(self) -> list[float]:
        """Of each evaluation of the last trajectory."""
        return [s for watch in self.watches for s in watch.seconds]

    def attempt(self, choice: Choice, config: ModiffConfig, exact: Sequence[Tensor]) -> Tried:
        """A whole trajectory with these settings; the target is plain again afterwards."""
        self.apply(config)
        try:
            error = difference(self.trajectory("errors", self.within), exact)
        finally:
            self.remove()
        return Tried(choice, error, statistics.median(self.seconds()[1:] or self.seconds()))


class Race:
    """Whole loops of a target with modiff on it and of its floats, in turn.

    seconds: of each evaluation of each round, by side. results: of the last one. uncompiled: why a side is not.
    Cost: no weight is copied, but compiled floats hold theirs in the layout of the processor.
    """

    def __init__(self, trials: Trials, config: ModiffConfig) -> None:
        floats = [clone(network) for network in trials.networks]
        trials.apply(config)
        self.trials, self.uncompiled = trials, "compile=False"
        self.runs: dict[str, list[Any]] = {MODIFF: [n._call_impl for n in trials.networks], FLOATS: floats}
        self.seconds: dict[str, list[list[float]]] = {side: [] for side in self.runs}
        self.results: dict[str, list[Tensor]] = {}

    def compile(self) -> None:
        """Compile both sides; one that cannot be stays as it is, with a warning."""
        self.uncompiled = ""
        settings: dict[str, dict[str, Any]] = {
            MODIFF: {"backend": _frozen, "fullgraph": True},
            FLOATS: {"options": _FREEZING},
        }
        for side, plain in self.runs.items():
            try:
                self.runs[side] = [torch.compile(run, dynamic=False, **settings[side]) for run in plain]
                self.once(side, "compiling")
            except Exception as error:  # any of the compiler's
                line = (str(error).strip() or repr(error)).splitlines()[0]
                self.runs[side], self.uncompiled = plain, f"{type(error).__name__}: {line}"
                warn_once(
                    f"{side}: {line}", f"accelerate: {side} run without torch.compile, more slowly: {self.uncompiled}"
                )

    def once(self, side: str, title: str = "loops") -> None:
        """One trajectory."""
        for watch, run in zip(self.trials.watches, self.runs[side], strict=True):
            watch.run = run
        self.results[side] = self.trials.trajectory(title, self.trials.within)

    def run(self) -> None:
        """All rounds."""
        start = time.perf_counter()
        for turn in range(ROUNDS):
            if turn < 2 or time.perf_counter() - start < SECONDS:
                for side, seconds in self.seconds.items():
                    self.once(side)
                    seconds.append(self.trials.seconds())

    def pace(self, side: str) -> float:
        """Evaluations in a second, each the fastest of its rounds."""
        fastest = [min(each) for each in zip(*self.seconds[side], strict=False)]
        return len(fastest) / sum(fastest)

    def keep(self) -> Report:
        """Leave modiff on the target, as it ran here, until it is removed."""
        report = Report(())
        for network, run in zip(self.trials.networks, self.runs[MODIFF], strict=True):
            attachment = required_attachment(network, "accelerate")
            report += attachment.report
            network._compiled_call_impl = run
            undo = functools.partial(setattr, network, "_compiled_call_impl", None)
            attachment.handles.append(SimpleNamespace(remove=undo))
        return report


def _frozen(module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """`backend` with the weights of float layers laid out for the processor, as those that it is compared with."""
    import torch._inductor.config as inductor  # imported late: it takes seconds

    with inductor.patch(_FREEZING):
        return backend(module, inputs)
