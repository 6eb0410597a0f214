"""Watch the layers of a full-precision network while it samples, one layer and one step at a time."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from modiff.config import LayerConfig, ModiffConfig, check
from modiff.errors import CalibrationError
from modiff.hosts.host import networks_of
from modiff.hosts.names import shortcut_splits
from modiff.model.attach import Attachment, check_plain
from modiff.model.observe import observe
from modiff.model.report import Entry, Report
from modiff.model.select import modulated_layer, select_layers
from modiff.nn import Clock, ModulatedLayer


class Visit(NamedTuple):
    """One call of one layer of the full-precision network.

    layer: the torch layer, its name in `entry`. config: what modiff would run it with. split: channel index of a
    concatenated input. call: how often the layer ran before within this evaluation of the network. step: from 0.
    ratio: size of this step over the last one, for the linear predictor.
    input, output: the layer's own tensors a_t and A(a_t) + bias; the network goes on with them: do not change them.
    """

    layer: nn.Module
    entry: Entry
    config: LayerConfig
    split: int | None
    call: int
    step: int
    ratio: Tensor | float
    input: Tensor
    output: Tensor

    @property
    def key(self) -> tuple[str, int]:
        """Name and call: what has states of its own."""
        return self.entry.name, self.call

    def modulated(self, config: LayerConfig) -> ModulatedLayer:
        """The modulated layer for a config, with the same weights; it is not run as a whole."""
        return modulated_layer(self.layer, config, self.entry.name, Clock("watch"), self.split)


class Watcher(Protocol):
    """Sees every call of every selected layer, in order; keeps what it needs of it."""

    def see(self, visit: Visit) -> None:
        """One call; the tensors are valid until it returns."""
        ...


def watch(target: Any, run: Callable[[], object], config: ModiffConfig, watchers: Sequence[Watcher]) -> Report:
    """Run one full-precision trajectory and show the watchers every layer that `config` would take.

    The network computes what it always does, and nothing is kept here. `run` samples one trajectory of the target, a
    pipeline with one denoiser, or a module, without modiff. Returns: the layers taken and left.
    Raises: StateError if modiff is on the target; ConfigError if it has several networks; CalibrationError if `run`
        never reached a layer's second step.
    """
    networks = networks_of(target)
    why = "They may name their layers alike. Watch one of the modules, with run= of the whole pipeline."
    check("watch", list(networks), len(networks) == 1, "one network", why)
    (module,) = networks.values()
    check_plain(module, "watch", "It shows what full precision computes. Call modiff.remove(...) first.")
    splits = shortcut_splits(module) if config.split_shortcuts == "auto" else {}
    report = select_layers(module, config, splits=splits)
    entries = {entry.name: entry for entry in report.taken}
    clock = Clock(type(module).__name__)
    attachment = Attachment(clock, report)
    last: dict[str, tuple[int, int]] = {}
    steps = dict.fromkeys(entries, 0)

    def show(name: str, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        """A layer ran: every watcher sees the visit."""
        entry = entries[name]
        if entry.config is None or not clock.inside:
            return
        tick, call = last.get(name, (-1, 0))
        call = call + 1 if tick == clock.tick else 0
        last[name] = clock.tick, call
        steps[name] += call == 0
        x, y = inputs[0].detach(), output.detach()
        visit = Visit(layer, entry, entry.config, splits.get(name), call, clock.step, clock.ratio, x, y)
        for watcher in watchers:
            watcher.see(visit)

    with ExitStack() as stack:
        stack.callback(lambda: [handle.remove() for handle in attachment.handles])
        attachment.watch(module)
        stack.enter_context(observe(module, show, layers=entries))
        stack.callback(clock.stop)
        clock.start()
        run()
    idle = [name for name, count in steps.items() if count < 2]
    if idle:
        raise CalibrationError(
            f"watch: expected at least two steps of every layer, got fewer of {', '.join(idle[:3])}. Errors grow over "
            "steps. Give more steps, or exclude layers that do not run."
        )
    return report
