"""The front of settings: for each layer those that pay, and the walk along their combinations, from fast to exact."""

import dataclasses
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from glob import escape
from itertools import combinations, product
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import nn

from modiff.config import LayerConfig, ModiffConfig, ModulationConfig, StateDtype
from modiff.core.affine import qrange
from modiff.model.autotune import MARGIN, Profile, measure_layer, signature
from modiff.model.probe import Probe
from modiff.model.select import group_of

BITS = (8, 4, 6, 5, 3)
"""Of activations and residuals, in the order in which they are timed: where 4 bits take the time of 8, no more are."""
STATES: tuple[StateDtype, ...] = ("float32", "int16")
"""How states are kept: in half the bytes, which takes less time on some processors and more on others."""
TRIES = 4
"""Trajectories of one walk."""


class Option(NamedTuple):
    """One way to run a layer, floats where config is None.

    seconds: of its calls in one evaluation, anchors included. error: of its input. states: bytes of its input state,
    under a key that layers have in common where they share it, and of its output state; of all contexts.
    """

    seconds: float
    error: float
    states: Mapping[str, int]
    config: LayerConfig | None

    @property
    def plain(self) -> bool:
        """Whether it runs on integers without states."""
        return self.config is not None and self.config.modulation is None

    @property
    def setting(self) -> str:
        """Short form."""
        if self.config is None:
            return "floats"
        loop = self.config.modulation or ModulationConfig()
        states = ", int16 states" if loop.state_dtype == "int16" else ""
        anchors = f", anchored every {loop.reanchor_every} steps" if loop.reanchor_every else ""
        return self.config.setting + states + anchors


Options = dict[str, list[Option]]
"""By layer: floats, then what is faster than all that is more exact and keeps no larger states."""
Choice = dict[str, Option]


def bytes_of_states(options: Iterable[Option]) -> int:
    """Of all their states, shared ones once."""
    return sum({key: size for option in options for key, size in option.states.items()}.values())


class Tried(NamedTuple):
    """A choice, the error of its trajectory, and the seconds of an evaluation in it."""

    choice: Choice
    error: float
    seconds: float = 0.0


def options_of(layer: nn.Module, probe: Probe, base: LayerConfig, times: Profile, every: int) -> list[Option]:
    """The ways to run a layer that pay; `times` keeps what is measured.

    The rounding error of codes is proportional to 1 / qmax: the errors that the probe measured, of plain 8 bits and of
    modulated 4, tell the others. A layer that anchors again every n steps is in floats at one of them.
    """
    (plain, modulated), x, spec = probe.errors(), probe.input, probe.layers[-1].spec
    tensor, split = f"{group_of(probe.name, probe.layers[-1]) or probe.name} reads {id(x)}", spec.split
    read, written = map(sum, zip(*probe.sizes.values(), strict=True))
    measured: dict[tuple[str, int], Mapping[str, float]] = {}
    options: list[Option] = []
    for dtype, bits in () if probe.layers[-1].unsupported else product(STATES, BITS):
        if bits not in (8, 4) and measured[dtype, 4]["modulated"] > MARGIN * measured[dtype, 8]["modulated"]:
            continue
        loop = dataclasses.replace(base.modulation or ModulationConfig(), state_dtype=dtype)
        activation = dataclasses.replace(base.activation, bits=bits)
        config = dataclasses.replace(base, activation=activation, modulation=loop)
        key = signature(layer, x, config, split)
        if key not in times:
            times[key] = measure_layer(layer, x, config, split)
        measured[dtype, bits] = seconds = times[key]
        again = seconds["modulated"] + (seconds["float"] / every if every else 0.0)
        anchored = dataclasses.replace(config, modulation=dataclasses.replace(loop, reanchor_every=every))
        errors = plain * qrange(8)[1] / qrange(bits)[1], modulated * qrange(4)[1] / qrange(bits)[1]
        size, grids = getattr(torch, dtype).itemsize, 4 * len(probe.sizes) if dtype == "int16" else 0
        states = {f"{tensor}, {read} numbers: {dtype}, {bits} bits": size * read + grids * len(spec.runs),
                  probe.name: size * written + grids}  # fmt: skip
        options += [Option(seconds["plain"], errors[0], {}, dataclasses.replace(config, modulation=None)),
                    Option(again, errors[1], states, anchored)]  # fmt: skip
    best = [Option(min((seconds["float"] for seconds in measured.values()), default=0.0), 0.0, {}, None)]
    for option in sorted(options, key=lambda o: (o.error, o.seconds)):
        rivals = [rival.seconds for rival in best if bytes_of_states([rival]) <= bytes_of_states([option])]
        if math.isfinite(option.error) and option.seconds < MARGIN * min(rivals):
            best.append(option)
    return [option._replace(seconds=option.seconds * probe.calls / probe.clock.tick) for option in best]


def cheapest(options: Options, price: float, budget: int | None = None) -> Choice:
    """For each layer the least of seconds + price * error^2; states fit into `budget` bytes where that is given.

    The layers that gain most by each byte of their states keep them.
    """

    def cost(option: Option) -> float:
        return option.seconds + price * option.error**2

    chosen = {name: min(ways, key=cost) for name, ways in options.items()}
    if budget is None or bytes_of_states(chosen.values()) <= budget:
        return chosen
    chosen = {name: min((o for o in ways if not o.states), key=cost) for name, ways in options.items()}
    gains = [((cost(chosen[name]) - cost(o)) / bytes_of_states([o]), name, o)
             for name, ways in options.items() for o in ways if o.states]  # fmt: skip
    kept: dict[str, int] = {}
    for gain, name, option in sorted(gains, key=itemgetter(0), reverse=True):
        states = kept | option.states
        if gain > 0 and not chosen[name].states and sum(states.values()) <= budget:
            kept, chosen[name] = states, option
    return chosen


def prices(options: Options) -> list[float]:
    """The prices of error at which `cheapest` changes its mind, from fast to exact; at the last one there is none."""
    pairs = (pair for ways in options.values() for pair in combinations(ways, 2))
    turns = {(exact.seconds - fast.seconds) / (fast.error**2 - exact.error**2)
             for exact, fast in pairs if exact.seconds > fast.seconds and exact.error < fast.error}  # fmt: skip
    return [0.0, *(turn * (1 + 1e-9) for turn in sorted(turns))]


def together(choice: Choice) -> float:
    """The errors of all layers, as if they were independent."""
    return math.hypot(*(option.error for option in choice.values()))


def fastest_within(
    max_error: float, options: Options, attempt: Callable[[Choice], Tried], budget: int | None = None
) -> tuple[Tried | None, Tried | None]:
    """The fastest choice within the error, None if only floats are; and the most exact one that was tried beyond it.

    The front is bisected where the errors of the layers, scaled by those of the last trajectory, say its end should be.
    """

    @cache
    def at(turn: int) -> Choice:
        return cheapest(options, turns[turn], budget)

    turns = prices(options)
    low, high = -1, len(turns) - all(option.config is None for option in at(len(turns) - 1).values())
    within, beyond, scale = None, None, math.inf
    for _ in range(TRIES):
        if high - low < 2:
            break
        middle = (low + high) // 2 if low >= 0 else 0
        if low >= 0 and math.isfinite(scale):
            middle = bisect_left(
                range(high), True, low + 1, high - 1, key=lambda i: scale * together(at(i)) <= max_error
            )
        tried = attempt(at(middle))
        scale = tried.error / (together(tried.choice) or math.inf)
        if tried.error <= max_error:
            within, high = tried, middle
        else:
            beyond, low = tried, middle
    return within, beyond


def config_of(base: ModiffConfig, choice: Choice) -> ModiffConfig:
    """The config that runs each layer as it was chosen."""
    floats = tuple(escape(name) for name, option in choice.items() if option.config is None)
    overrides = tuple((escape(name), option.config) for name, option in choice.items() if option.config is not None)
    return dataclasses.replace(base, exclude=(*base.exclude, *floats), overrides=overrides)
