"""An analysis in words: which bits are safe, whether modulation helps, which layers stand out, what to type next."""

import itertools
import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from modiff.evaluate.analysis.layers import LayerTrace, trace_name
from modiff.evaluate.analysis.run import Analysis

SAFE = 0.02
"""Relative L2 of images up to which bits are called safe; `modiff accelerate` allows as much."""
TELLS = 1.1
"""Ratio of two errors up to which a few images do not tell them apart."""
STANDS_OUT, NAMED = 2.0, 3
"""Times the median layer's error from which a layer is named, and how many are."""
Errors = Mapping[int, float]
"""Bits and the error of the images at them, infinite where they were not finite."""


def findings(analysis: Analysis, model: str, scheduler: str | None = None) -> str:
    """Four lines or more, all computed. model, scheduler: as they are typed, for the command that comes next.

    Bits are safe if the images of these and of all wider ones that ran are at most SAFE from full precision.
    """
    sweep: dict[str, dict[int, float]] = {}
    for row in sorted(analysis["sweep"], key=lambda row: -row["bits"]):
        sweep.setdefault(row["mode"], {})[row["bits"]] = math.inf if row["relative_l2"] is None else row["relative_l2"]
    safe = {mode: list(itertools.takewhile(lambda bits, e=e: e[bits] <= SAFE, e)) for mode, e in sweep.items()}
    narrowest = {mode: widths[-1] for mode, widths in safe.items() if widths}
    lines = [_safe_bits(sweep, narrowest, analysis["settings"]), _gain(sweep["plain"], sweep["modulated"])]
    lines += [_layers(analysis["layers"]), *(outlier["advice"] for outlier in analysis["outliers"])]
    return "\n".join([*lines, f"Next: {_next(narrowest, analysis['settings'], model, scheduler)}"])


def listed(texts: Sequence[str], most: int = NAMED) -> str:
    """Words in a sentence; those after `most` are counted.

    >>> listed(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    shown = [*texts[:most], *[f"{len(texts) - most} more"] * (len(texts) > most)]
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))


def _safe_bits(sweep: Mapping[str, Errors], narrowest: Mapping[str, int], settings: Mapping[str, Any]) -> str:
    told = [f"{mode} {f'{narrowest[mode]} bits' if mode in narrowest else f'none ({_figure(min(errors.values()))})'}"
            for mode, errors in sweep.items()]  # fmt: skip
    weight = settings["config"]["layer"]["weight"]["bits"]
    weights = f"weights {f'at {weight} bits' if weight else 'in full precision'}"
    broken = [f"{mode} at {bits} bits" for mode, errors in sweep.items() for bits, e in errors.items() if e == math.inf]
    end = f" Not usable, images not finite: {listed(broken)}." if broken else ""
    count = f"{settings['num_images']} image{'s' * (settings['num_images'] > 1)}"
    return f"Safe down to: {', '.join(told)} ({count} at most {SAFE:g} from full precision, {weights}).{end}"


def _figure(error: float) -> str:
    return f"{error:.3g}" if error < math.inf else "not finite"


def _gain(plain: Errors, modulated: Errors) -> str:
    """Modulated against plain at the bits where the gain is largest, and at which others."""
    ratios = {bits: p / m if (m := modulated[bits]) else math.inf for bits, p in plain.items() if p != modulated[bits]}
    if not ratios:
        return "Whether modulation helps is not to be seen: with and without it the images are the same, or not finite."
    best = max(ratios, key=ratios.__getitem__)
    figures = f"at {best} bits the error is {_figure(modulated[best])} instead of {_figure(plain[best])}"
    if ratios[best] <= TELLS:
        return f"Modulation does not help: {figures}, and that is where it does best."
    times = f", {ratios[best]:.3g} times less" if ratios[best] < math.inf else ""
    others = [str(bits) for bits in plain if ratios.get(bits, 1.0) <= TELLS]
    where = f"not at {listed(others, len(plain))} bits" if others else "and it does at all bits that ran"
    return f"Modulation helps: {figures}{times}; {where}."


def _layers(layers: Sequence[LayerTrace]) -> str:
    """Layers whose output is far off on the inputs of full precision, mean over the steps."""
    means = {trace_name(layer): np.mean([step["output_relative_l2"] for step in layer["steps"]]) for layer in layers}
    worst = [f"{name} ({means[name]:.2g})" for name in sorted(means, key=means.__getitem__, reverse=True)]
    middle = np.median(list(means.values()))
    count = sum(bool(error) and error >= STANDS_OUT * middle for error in means.values())
    what = "error of the output, same inputs, mean of the steps"
    if count and len(layers) > 1:
        return f"Layers that stand out ({what}): {listed(worst[:count])}; the median layer has {middle:.2g}."
    return f"No layer stands out ({what}): {worst[0]} is the worst, the median layer has {middle:.2g}."


def _next(narrowest: Mapping[str, int], settings: Mapping[str, Any], model: str, scheduler: str | None) -> str:
    """The command that answers what this analysis leaves open."""
    weight, steps = settings["config"]["layer"]["weight"]["bits"], settings["steps"]
    safe = {mode: bits for mode, bits in narrowest.items() if mode != "uncompensated"}
    words = [model, *(["--scheduler", scheduler] if scheduler else [])]
    for option in "prompt", "label":
        words += [f"--{option}", str(settings[f"{option}s"][0])] if settings[f"{option}s"] else []
    bits = safe.get("modulated", min(safe.values(), default=4))
    why, more = "the same with weights at 8 bits", ["analyze", "-o", "analysis-2", "--config", f"modulated:8:{bits}"]
    if safe and weight is not None:
        configs = ",".join(f"{mode}:{weight}:{bits}" for mode, bits in safe.items())
        why, more = "on many images, against fewer steps", ["evaluate", "--configs", configs, "--report", "report"]
    elif weight is not None:
        why, more = "are the weights to blame?", ["analyze", "-o", "analysis-2", "--config", "modulated:32:4"]
    elif not safe:
        why, more, steps = "with more steps, each changes less", ["analyze", "-o", "analysis-2"], 2 * steps
    return f"{why}: {shlex.join(['modiff', more[0], *words, '--steps', str(steps), *more[1:]])}"
