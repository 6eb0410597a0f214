"""What a full-precision trajectory tells: errors of candidate settings at each layer, and the samples themselves."""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from glob import escape
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from modiff.config import LayerConfig, ModiffConfig
from modiff.core.quantizer import Quantizer
from modiff.core.recursion import State, compute_dtype, encode
from modiff.errors import CalibrationError
from modiff.model.attach import ATTRIBUTE, Attachment, sample_of
from modiff.model.observe import first_tensor, observe
from modiff.model.roles import Outlier, Roles, warn_unfit
from modiff.model.select import layer_names, modulated_layer, select_layers
from modiff.nn import Clock, ModulatedLayer
from modiff.nn.adapters import modules_of


class Probe:
    """Quantizes the input of one full-precision layer as every candidate would, and sums up their errors.

    input: the first one. calls: of the layer. unfit: why it should keep its floats.
    sizes: numbers read and written, by context and how many times the layer was called before in the evaluation.
    """

    def __init__(
        self, layer: nn.Module, name: str, choices: list[LayerConfig], clock: Clock, split: int | None = None
    ) -> None:
        self.name, self.clock = name, clock
        self.input, self.calls, self.unfit = torch.empty(0), 0, ""
        self.sizes: dict[tuple[str, int], tuple[int, int]] = {}
        self._before, self._tick = 0, -1
        self.layers = [modulated_layer(layer, choice, name, clock, split) for choice in choices]
        self.states: dict[str, list[State | None]] = {}
        self.noise = torch.zeros(len(choices), dtype=torch.float64)
        self.signal = 0.0
        clock.on_reset(self.states.clear)

    def see(self, x: Tensor, outputs: int = 0) -> None:
        """The layer ran on `x`: one step of every candidate."""
        self.input = self.input if self.calls else x
        self._before = self._before + 1 if self._tick == self.clock.tick else 0
        self.sizes[self.clock.context, self._before] = x.numel(), outputs
        x, self.calls, self._tick = x.detach(), self.calls + 1, self.clock.tick
        starts = self.clock.context not in self.states
        states = self.states.setdefault(self.clock.context, [None] * len(self.layers))
        prepared: dict[object, Tensor] = {}
        for i, layer in enumerate(self.layers):
            key = layer.spec.rotation, layer.config.smoothing, layer.config.large_channels
            if key not in prepared:
                prepared[key] = layer.spec.prepared(x, None)
            states[i] = self._advance(i, layer, prepared[key], states[i])
        if not starts:
            self.signal += float(x.float().square().sum())

    def _advance(self, i: int, layer: ModulatedLayer, value: Tensor, state: State | None) -> State | None:
        quantizer, modulation = cast(Quantizer, layer.quantizer), layer.config.modulation
        if modulation is None:  # counted from the second step on, like the others
            if state is not None:
                code = quantizer(value.float())
                self.noise[i] += float((value.float() - (0.0 if code is None else code.value())).square().sum())
            return State(value)
        _, now = encode(value, state, quantizer, modulation, 1.0 if state is None else self.clock.ratio)
        if state is not None:
            self.noise[i] += float((value.to(compute_dtype(modulation)) - now.value).square().sum())
        return now

    def errors(self) -> list[float]:
        """Relative error of each candidate over all steps but the first; NaN if there are none."""
        if self.signal == 0:
            return [math.nan] * len(self.layers)
        return [math.sqrt(float(n) / self.signal) for n in self.noise]


@contextmanager
def probes_of(
    model: nn.Module,
    config: ModiffConfig,
    choices: list[LayerConfig],
    splits: Mapping[str, int],
    known: Collection[str] = (),
) -> Iterator[list[Probe]]:
    """Probes on the layers that the config takes, while the body runs one full-precision trajectory."""
    clock, modules = Clock(type(model).__name__), modules_of(model)
    report = select_layers(model, config, splits=splits, known=known)
    watcher = Attachment(clock, report)
    splits = splits if config.split_shortcuts == "auto" else {}
    probes = {
        entry.name: Probe(modules[entry.name], entry.name, choices, clock, splits.get(entry.name))
        for entry in report.taken
    }
    with ExitStack() as stack:
        stack.callback(lambda: [handle.remove() for handle in watcher.handles])
        watcher.watch(model)
        roles = Roles(config, report)
        stack.enter_context(watching(model, roles))

        def on_layer(name: str, _layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            probes[name].see(inputs[0], output.numel())

        stack.enter_context(observe(model, on_layer, layers=probes))
        stack.callback(clock.stop)
        clock.start()
        stack.callback(model.__dict__.pop, ATTRIBUTE, None)
        model.__dict__[ATTRIBUTE] = watcher  # contexts of guidance find the clock here
        yield list(probes.values())
    left = {name: "ran at one step only" for name, probe in probes.items() if math.isnan(probe.errors()[0])}
    left |= roles.unfit()
    for name, why in left.items():
        probes[name].unfit = why


def plain_layer(config: LayerConfig) -> LayerConfig:
    """The same layer without states: it codes whole inputs, at 8 bits."""
    activation = dataclasses.replace(config.activation, bits=8, clip=1.0, refresh_every=1)
    return dataclasses.replace(config, modulation=None, activation=activation)


def errors_if_plain(
    models: Mapping[nn.Module, Mapping[str, int]], config: ModiffConfig, run: Callable[[], object]
) -> dict[str, float]:
    """For each modulated layer, the squared relative error of its network's output where it alone runs plain.

    models: with their splits. Measured at the evaluation in the middle of the trajectory that `run` runs.
    Cost: that trajectory, and an evaluation for each layer; no states.
    """
    known, errors = layer_names(models), dict[str, float]()
    calls: dict[nn.Module, list[tuple[Any, Any]]] = {model: [] for model in models}
    with torch.no_grad(), ExitStack() as stack:
        for model in models:
            stack.enter_context(observe(model, before_step=lambda model, *call: calls[model].append(call)))
        run()
    for model, splits in models.items():
        if not calls[model]:
            continue
        modules, call = modules_of(model), calls[model][len(calls[model]) // 2]
        exact = _evaluated(model, *call)
        for entry in select_layers(model, config, splits=splits, known=known).taken:
            if entry.config is not None and entry.config.modulation is not None:
                layer, split = modules[entry.name], splits.get(entry.name) if config.split_shortcuts == "auto" else None
                plain = modulated_layer(layer, plain_layer(entry.config), entry.name, Clock("plain"), split)
                coded = _evaluated(model, *call, layer, plain)
                errors[entry.name] = float((coded - exact).square().sum() / exact.square().sum())
    return errors


def fitted_to_run(
    models: Mapping[nn.Module, Mapping[str, int]], config: ModiffConfig, run: Callable[[], object]
) -> tuple[ModiffConfig, dict[str, str]]:
    """The config for what a run shows of layers, and why which is left or split: their roles, in order of execution.

    models: with their splits. Channels that dwarf the others of their layer are split off; layers with groups are
    left instead. Ends that registration or the source of `forward` named wrongly are taken.
    Cost: a trajectory in full precision, and a pass over the inputs of its layers.
    """
    known = layer_names(models)
    reports = {model: select_layers(model, config, splits=splits, known=known) for model, splits in models.items()}
    each = {model: Roles(config, report) for model, report in reports.items()}
    with torch.no_grad(), ExitStack() as stack:
        for model, roles in each.items():
            stack.enter_context(watching(model, roles))
        run()
    taken = {entry.name: entry for report in reports.values() for entry in report.taken}
    modules = {name: module for model in models for name, module in modules_of(model).items()}
    unfit = {name: why for roles in each.values() for name, why in roles.unfit().items()}
    outliers = {o.name: o for roles in each.values() for o in roles.maxima.outliers() if unfit.get(o.name) == o.why}
    split = {n: o for n, o in outliers.items() if getattr(modules[n], "groups", 1) == 1}
    left = {name: why for name, why in unfit.items() if name not in split}
    warn_unfit("apply", {n: why for n, why in left.items() if n in outliers}, "They stay in full precision.")
    overrides = tuple((escape(n), _split_off(taken[n].config, modules[n], o)) for n, o in split.items())
    notes = left | {name: f"channels split off: {len(o.large)} dwarf the others" for name, o in split.items()}
    include = (*config.include, *(escape(name) for roles in each.values() for name in roles.no_ends()))
    exclude = (*config.exclude, *map(escape, left))
    config = dataclasses.replace(config, include=include, overrides=(*config.overrides, *overrides), exclude=exclude)
    return config, notes


@contextmanager
def watching(model: nn.Module, roles: Roles) -> Iterator[None]:
    """Let `roles` see all evaluations of the model in the body."""
    begin, end = lambda m, *call: roles.begin(m, sample_of(*call)), lambda *_: roles.close()
    with ExitStack() as stack:
        stack.callback(roles.close)
        stack.enter_context(observe(model, None, end, before_step=begin))
        yield


def _split_off(config: LayerConfig | None, layer: nn.Module, outlier: Outlier) -> LayerConfig:
    """The large channels get a scale of their own, and are smoothed until it fits all of them."""
    config = cast(LayerConfig, config)
    count = int(layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels)
    largest = max(outlier.large.values())
    factors = [outlier.large.get(i, largest) / largest * (config.smoothing or [1.0] * count)[i] for i in range(count)]
    return dataclasses.replace(config, large_channels=tuple(outlier.large), smoothing=tuple(factors))


@torch.no_grad()
def _evaluated(
    model: nn.Module, args: Any, kwargs: Any, layer: nn.Module | None = None, plain: ModulatedLayer | None = None
) -> Tensor:
    def replace(_: nn.Module, inputs: Any, words: Any, _output: Tensor) -> Tensor:
        return cast(ModulatedLayer, plain).loop.plain((*inputs, *words.values())[0], None)

    hook = None if layer is None else layer.register_forward_hook(replace, with_kwargs=True)
    try:
        output = model(*args, **kwargs)
    finally:
        if hook is not None:
            hook.remove()
    return first_tensor(output).double()


def without_unfit(verb: str, config: ModiffConfig, probes: Iterable[Probe]) -> tuple[ModiffConfig, list[Probe]]:
    """The config with the layers excluded that should keep their floats, and the other probes; a warning says why."""
    unfit, fit = {p.name: p.unfit for p in probes if p.unfit}, [p for p in probes if not p.unfit]
    if not fit:
        raise CalibrationError(
            f"{verb}: expected two steps or more of a layer that can be quantized, got none: {unfit}. `run` must run "
            "a whole trajectory. Give more steps, or include layers by name."
        )
    warn_unfit(verb, unfit, "They stay in full precision: the config excludes them now.")
    return dataclasses.replace(config, exclude=(*config.exclude, *map(escape, unfit))), fit


class Track(NamedTuple):
    """Of each evaluation of any of the networks, in order of time."""

    samples: list[Tensor]
    outputs: list[Tensor]


@contextmanager
def tracked(models: Sequence[nn.Module]) -> Iterator[Track]:
    """Record the evaluations of all of `models` in the body."""
    track = Track([], [])

    def before(_: nn.Module, *call: Any) -> None:
        if (sample := sample_of(*call)) is not None:
            track.samples.append(sample.detach().clone())

    def after(*call: Any) -> None:
        track.outputs.append(first_tensor(call[-1]).detach().clone())

    with ExitStack() as stack:
        for model in models:
            stack.enter_context(observe(model, None, after, before_step=before))
        yield track
