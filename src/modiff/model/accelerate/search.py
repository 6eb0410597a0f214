"""Time the layers, walk the front, race the winner against floats, and tell what was gained."""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from modiff.config import ModiffConfig, check
from modiff.model.accelerate.loops import FLOATS, MODIFF, ROUNDS, Race, Trials, difference, watched
from modiff.model.accelerate.settings import TRIES, Choice, Options, Tried, config_of, fastest_within, options_of
from modiff.model.autotune import MARGIN, Profile
from modiff.model.probe import Probe, probes_of, without_unfit
from modiff.model.report import Report
from modiff.model.select import layer_names
from modiff.nn.adapters import modules_of

WALKS = ((0, False), (0, True), (10, False))
"""(how often layers anchor again, 0 is never; whether plain integers may be taken) of the fronts that are walked."""
TRAJECTORIES = 2 + TRIES * len(WALKS) + 2 * (1 + ROUNDS)
"""Of an example, at most: full precision, layers, errors, both sides to compile and to race."""
CLEARLY = 0.9
"""Share of an earlier front's time that a later one must take at most: its trajectories were not compiled."""
SPARE = 0.95
"""Share of the error allowed that the search spends: the compiled loop rounds a little differently."""


@dataclasses.dataclass(frozen=True)
class AccelerateResult:
    """What `modiff.accelerate` made of a target, and what it gained. Prints as a few lines.

    before, floats, after: evaluations of the network in a second, as it was, with (compiled) floats, and with `config`.
    error: relative L2 to full precision of what the example made. choices: how many layers run in which setting.
    accelerated: whether modiff is on the target now; it is as it was otherwise, and `reason` says why. report: of the
    layers, with memory. advice: what to try next.
    """

    before: float
    max_error: float
    accelerated: bool = False
    reason: str = ""
    floats: float = math.nan
    after: float = math.nan
    error: float = math.nan
    choices: dict[str, int] = dataclasses.field(default_factory=dict)
    config: ModiffConfig | None = None
    report: Report | None = None
    advice: tuple[str, ...] = ()

    @property
    def gain(self) -> float:
        """How many times as fast as (compiled) floats the chosen settings ran."""
        return self.after / self.floats

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        numbers = {k: v if math.isfinite(v) else None for k, v in values.items() if isinstance(v, float)}
        objects = {"config": self.config and self.config.to_dict(), "report": self.report and self.report.to_dict()}
        return values | numbers | objects | {"advice": list(self.advice)}

    def __str__(self) -> str:
        lines = [f"left as it was: {self.reason}"]
        if self.accelerated:
            speeds = f"{self.after:.4g} evaluations a second, floats {self.floats:.4g}, as it was {self.before:.4g}"
            error = f"relative L2 {self.error:.4f} to full precision, at most {self.max_error:g} allowed"
            lines = [f"{self.gain:.2f}x as fast as floats: {speeds} ({self.reason})", f"  {error}"]
        counts = ", ".join(f"{count} {setting}" for setting, count in self.choices.items())
        lines += [f"  layers: {counts}"] if counts else []
        lines += [f"  {self.report.memory}"] if self.report else []
        return "\n".join(lines + [f"  next: {line}" for line in self.advice])


def accelerate_networks(
    trials: Trials, base: ModiffConfig, *, max_error: float, compile: bool, budget: int | None, times: Profile
) -> AccelerateResult:
    """As `modiff.accelerate`."""
    with watched(trials.networks) as trials.watches:
        exact, seconds = trials.trajectory("full precision"), trials.seconds()
    ran, expected = f"{len(seconds)} evaluations", "a trajectory of the target whose result is finite and not all zero"
    finite = bool(seconds) and difference(exact, exact) == 0
    check("accelerate.example", ran, finite, expected, "Errors are relative to it. Run the target that is given.")
    result = AccelerateResult(len(seconds) / sum(seconds), max_error)
    base, fit = without_unfit("accelerate", base, _probed(trials, base, exact, max_error))
    layers = {name: layer for network in trials.networks for name, layer in modules_of(network).items()}
    with watched(trials.networks) as trials.watches:
        attempts: dict[ModiffConfig, Tried] = {}

        def attempt(choice: Choice) -> Tried:
            config = config_of(base, choice)
            if config not in attempts:
                attempts[config] = trials.attempt(choice, config, exact)
            return attempts[config]

        best, beyond = None, None
        for every, plain in WALKS:
            if every and beyond is None:  # the fastest settings of all are exact enough
                break
            ways: Options = {}
            for number, p in enumerate(fit, 1):
                trials.bar.set_description(f"times of layer {number} of {len(fit)}")
                ways[p.name] = options_of(layers[p.name], p, base.layer, times, every)
            options = {
                name: [o for o in each if plain or budget is not None or not o.plain] for name, each in ways.items()
            }
            within, worse = fastest_within(SPARE * max_error, options, attempt, budget)
            best = within if within and (best is None or within.seconds < CLEARLY * best.seconds) else best
            beyond = beyond or worse
        result = dataclasses.replace(result, advice=_advice(trials, beyond, compile))
        if best is None:
            return dataclasses.replace(result, reason=f"no integers are faster with an error of {max_error:g} at most")
        config = config_of(base, best.choice)
        race = Race(trials, config)
        try:
            if compile:
                race.compile()
            race.run()
            result = _judged(result, race, exact, best, config)
        finally:
            if not result.accelerated:
                trials.remove()
    return dataclasses.replace(result, report=race.keep()) if result.accelerated else result


def _probed(trials: Trials, base: ModiffConfig, exact: Sequence[Tensor], max_error: float) -> list[Probe]:
    """Errors of plain 8 bits and of modulated 4, for each layer, from a second trajectory in full precision."""
    coarse = dataclasses.replace(base.layer, activation=dataclasses.replace(base.layer.activation, bits=4))
    candidates = [dataclasses.replace(base.layer, modulation=None), coarse]
    known, probes = layer_names(trials.networks), list[Probe]()
    with ExitStack() as stack:
        for network, split in zip(trials.networks, trials.splits or [{}] * len(trials.networks), strict=True):
            probes += stack.enter_context(probes_of(network, base, candidates, split, known))
        error = difference(trials.trajectory("layers", trials.contexts), exact)
    check(
        "accelerate.example", f"results that differ by {error:.2g}", error < max_error / 10,
        "a trajectory with the same noise at each call", "Both ran in full precision. Seed what the example draws.",
    )  # fmt: skip
    return probes


def _judged(
    result: AccelerateResult, race: Race, exact: Sequence[Tensor], best: Tried, config: ModiffConfig
) -> AccelerateResult:
    """Integers stay where they win the race."""
    floats, after, error = race.pace(FLOATS), race.pace(MODIFF), difference(race.results[MODIFF], exact)
    wins = after * MARGIN >= floats and error <= result.max_error
    reason = f"not compiled: {race.uncompiled}" if race.uncompiled else "both compiled"
    if not wins:
        reason = f"the best settings ran at {after / floats:.2f}x the speed of floats, with an error of {error:.4f}"
    choices = dict(Counter(option.setting for option in best.choice.values()).most_common())
    return dataclasses.replace(result, accelerated=wins, reason=reason, floats=floats, after=after, error=error,
                               choices=choices, config=config)  # fmt: skip


def _advice(trials: Trials, beyond: Tried | None, compile: bool) -> tuple[str, ...]:
    lines = ["fewer steps, or a sampler that needs fewer: half of the steps take half of the time"]
    if beyond is not None and beyond.error < 0.5:
        lines.insert(0, f"max_error={1.1 * beyond.error:.2g}: faster settings had an error of {beyond.error:.4f}")
    if not compile:
        lines.append("compile=True: norms and activations then run inside of the layers")
    weight = next(trials.networks[0].parameters())
    bf16 = any(torch.cpu.get_capabilities().get(name) for name in ("amx_bf16", "avx512_bf16"))
    if weight.dtype == torch.float32 and (bf16 or weight.device.type != "cpu"):
        lines.append(".to(torch.bfloat16) first: this device has instructions for it, and floats gain as well")
    return tuple(lines)
