"""Where zero bits pay: layers that send nothing while little changed, against simply taking fewer steps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, get_args

from experiments.charts import Line, line_chart
from experiments.configs import coded, looped
from experiments.experiment import Experiment, Shown, Values
from experiments.lab import Lab, Plan, Row
from experiments.paper.zero_bits_text import WHY, found_text, tables
from experiments.runs import Run
from experiments.skipping import SkipRule, Unit
from experiments.words import error
from modiff import presets
from modiff.config import ModiffConfig
from modiff.evaluate.report.document import Block, Figure

UNITS: tuple[Unit, ...] = get_args(Unit)
THRESHOLDS = {False: (0.01, 0.03, 0.1), True: (0.003, 0.01, 0.02, 0.03, 0.06, 0.1, 0.2)}
SHARES = {False: (0.9, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2), True: (0.96, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)}
SAMPLERS = ("ddim", "dpmsolver++")
SPACING = "trailing"
"""Every number of steps starts at the last timestep, so that fewer steps are no other start."""
LIMIT = 4
GAIN = 0.8
CODED_UNITS: tuple[Unit, ...] = ("layer", "token")
CODED_BITS = 4
Curve = Sequence[tuple[float, float]]
"""(share of the operations, relative L2) of fewer steps, in any order."""


def silent(predictor: str) -> ModiffConfig:
    """Full precision that may keep silent: what is sent is the residual itself."""
    nothing = coded(presets.published(None, 8), bits=0)
    return looped(nothing, predictor="linear", gain=GAIN) if predictor == "linear" else looped(nothing)


def measure(lab: Lab) -> Values:
    """Each unit, predictor and threshold; fewer steps of both samplers; and silence on top of 4-bit codes."""
    bases = (lab.settings.steps, 2 * lab.settings.steps) if lab.settings.full else (lab.settings.steps,)
    return {"bases": [_measured(lab, steps) for steps in bases if steps <= lab.most_steps]}


def _measured(lab: Lab, steps: int) -> dict[str, Any]:
    full = Run(steps=steps, spacing=SPACING)
    skipping: Plan = [
        (
            {"unit": unit, "predictor": predictor, "threshold": threshold},
            Run(steps=steps, spacing=SPACING, config=silent(predictor), skip=SkipRule(unit=unit, threshold=threshold)),
        )
        for predictor in ("hold", "linear")
        for unit in UNITS
        for threshold in THRESHOLDS[lab.settings.full]
    ]
    limit = {s: Run(steps=min(LIMIT * steps, lab.most_steps), sampler=s, spacing=SPACING) for s in SAMPLERS}
    found: dict[str, Any] = {"steps": steps, "limit_steps": limit["ddim"].steps}
    fewer = sorted({max(2, round(share * steps)) for share in SHARES[lab.settings.full]} - {steps}, reverse=True)
    for sampler in SAMPLERS:
        own = Run(steps=steps, sampler=sampler, spacing=SPACING)
        plan: Plan = [({}, Run(steps=n, sampler=sampler, spacing=SPACING)) for n in (steps, *fewer)]
        found[sampler] = lab.rows(plan, reference=own, limit=limit[sampler])
    whole = found["ddim"][0]["gbops"]
    curves = {s: _curve(found[s], whole, "relative_l2") for s in SAMPLERS}
    curves |= {f"{s}_limit": _curve(found[s], whole, "to_limit") for s in SAMPLERS}
    found["skipping"] = _judged(lab.rows(skipping, reference=full, limit=limit["ddim"]), whole, curves)
    found["half"] = _half(found["skipping"], curves)
    found["coded"] = _coded(lab, full, fewer, whole)
    return found


def _coded(lab: Lab, full: Run, fewer: Sequence[int], whole: float) -> dict[str, Any]:
    """4-bit codes that may keep silent, against 4-bit codes with fewer steps."""
    config = presets.published(None, CODED_BITS)
    steps: Plan = [({}, Run(steps=n, spacing=SPACING, config=config)) for n in (full.steps, *fewer)]
    rules = [SkipRule(unit=unit, threshold=t) for unit in CODED_UNITS for t in THRESHOLDS[lab.settings.full]]
    silences: Plan = [
        (
            {"unit": r.unit, "predictor": "hold", "threshold": r.threshold},
            Run(steps=full.steps, spacing=SPACING, config=config, skip=r),
        )
        for r in rules
    ]
    rows = lab.rows(steps, reference=full)
    curves = {"ddim": _curve(rows, whole, "relative_l2")}
    return {"steps": rows, "skipping": _judged(lab.rows(silences, reference=full), whole, curves)}


def _curve(rows: Sequence[Row], whole: float, key: str) -> Curve:
    return [(row["gbops"] / whole, row[key]) for row in rows if row[key] is not None]


def _judged(rows: Sequence[Row], whole: float, curves: dict[str, Curve]) -> list[Row]:
    """The rows with their share of the operations, and the error of fewer steps at as many."""
    found: list[Row] = []
    for row in rows:
        share = row["gbops"] / whole
        equal = {f"{name}_equal": at_share(curve, share) for name, curve in curves.items()}
        found.append({**row, "share": share, **equal})
    return found


def _half(rows: Sequence[Row], curves: dict[str, Curve]) -> list[Row]:
    """The error at half of the operations, of silence (between two thresholds that were run) and of fewer steps."""
    found: list[Row] = []
    for unit, predictor in dict.fromkeys((row["unit"], row["predictor"]) for row in rows):
        own = [row for row in rows if (row["unit"], row["predictor"]) == (unit, predictor)]
        silence = at_share([(row["share"], row["relative_l2"]) for row in own if row["relative_l2"] is not None], 0.5)
        steps = {f"{sampler}_equal": at_share(curves[sampler], 0.5) for sampler in SAMPLERS}
        found.append({"unit": unit, "predictor": predictor, "silence": silence, **steps})
    return found


def at_share(curve: Curve, share: float) -> float | None:
    """The error of fewer steps at a share of the operations, between two numbers of steps that were run.

    Straight lines in log error over log share; to an error of 0 (all steps against themselves) a straight line in
    both. None outside of what was run.

    >>> at_share([(1.0, 0.0), (0.5, 0.1), (0.25, 0.4)], 0.75), at_share([(0.5, 0.1), (0.25, 0.4)], 0.125)
    (0.05, None)
    """
    points = sorted(curve)
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= share <= x1:
            if y0 <= 0 or y1 <= 0:
                return y0 + (y1 - y0) * (share - x0) / (x1 - x0)
            part = math.log(share / x0) / math.log(x1 / x0)
            return math.exp(math.log(y0) + part * (math.log(y1) - math.log(y0)))
    return None


def show(values: Values) -> Shown:
    """For each number of steps: what silence costs beside fewer steps, as tables and charts."""
    blocks: list[Block] = []
    for base in values["bases"]:
        blocks += [found_text(base), *tables(base), *(_chart(base, predictor) for predictor in ("hold", "linear"))]
    return Shown(tuple(blocks), WHY)


def _chart(base: dict[str, Any], predictor: str) -> Figure:
    whole = base["ddim"][0]["gbops"]
    lines = [
        Line(
            label=f"{sampler}, fewer steps",
            x=[row["gbops"] / whole for row in base[sampler]],
            y=[error(row) for row in base[sampler]],
            dashed=True,
            colour=colour,
        )
        for sampler, colour in zip(SAMPLERS, (7, 4), strict=True)
    ]
    for i, unit in enumerate(UNITS):
        rows = [row for row in base["skipping"] if row["unit"] == unit and row["predictor"] == predictor]
        label = f"silent by {unit}"
        lines.append(Line(label=label, x=[row["share"] for row in rows], y=[error(row) for row in rows], colour=i))
    return line_chart(
        f"study-zero-bits-{predictor}-{base['steps']}",
        lines,
        title=f"Zero bits, {predictor}",
        x="share of the operations",
        y=f"relative L2 to {base['steps']} steps",
        half=True,
        caption=f"Silence below a threshold ({predictor}), against fewer steps. Lower left is better.",
    )


EXPERIMENT = Experiment(
    name="zero-bits",
    title="Where zero bits pay",
    printed=(
        "zero bits for a residual reuse the output, so that feature caching is the limit of the method (remark 4.1), "
        "and it could be combined with sparse residuals (remark 4.2). Neither is evaluated.",
    ),
    measure=measure,
    show=show,
)
