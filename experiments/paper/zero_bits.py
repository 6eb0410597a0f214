"""Where zero bits pay: layers that send nothing while little changed, against simply taking fewer steps."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

from experiments.charts import Line, curves, line_chart
from experiments.experiment import Experiment, Shown, Values, listing
from experiments.lab import Lab, Plan, Row
from experiments.runs import PAPER, Run, looped, quantized_with
from experiments.skipping import SkipRule, Unit
from modiff import presets
from modiff.config import ModiffConfig
from modiff.evaluate.report.document import Content, Figure, Table

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
    nothing = quantized_with(presets.published(None, 8), bits=0)
    return looped(nothing, replace(PAPER, predictor="linear", gain=GAIN) if predictor == "linear" else PAPER)


def measure(lab: Lab) -> Values:
    """Each unit, predictor and threshold; fewer steps of both samplers; and silence on top of 4-bit codes."""
    bases = (lab.settings.steps, 2 * lab.settings.steps) if lab.settings.full else (lab.settings.steps,)
    return {"bases": [_measured(lab, steps) for steps in bases if steps <= lab.most_steps]}


def _measured(lab: Lab, steps: int) -> Row:
    full, coded = Run(steps=steps, spacing=SPACING), presets.published(None, CODED_BITS)
    limit = {s: Run(steps=min(LIMIT * steps, lab.most_steps), sampler=s, spacing=SPACING) for s in SAMPLERS}
    base: Row = {"steps": steps, "limit_steps": limit["ddim"].steps}
    fewer = sorted({max(2, round(share * steps)) for share in SHARES[lab.settings.full]} - {steps}, reverse=True)
    for s in SAMPLERS:
        plan: Plan = [({}, Run(steps=n, sampler=s, spacing=SPACING)) for n in (steps, *fewer)]
        base[s] = lab.rows(plan, reference=Run(steps=steps, sampler=s, spacing=SPACING), limit=limit[s])
    whole = base["ddim"][0]["gbops"]
    curve = {s: _curve(base[s], whole, "relative_l2") for s in SAMPLERS}
    curve |= {f"{s}_limit": _curve(base[s], whole, "to_limit") for s in SAMPLERS}
    plans = [_silences(lab, steps, UNITS, predictor, silent(predictor)) for predictor in ("hold", "linear")]
    base["skipping"] = _judged(lab.rows([*plans[0], *plans[1]], reference=full, limit=limit["ddim"]), whole, curve)
    rows = lab.rows([({}, Run(steps=n, spacing=SPACING, config=coded)) for n in (steps, *fewer)], reference=full)
    silences = lab.rows(_silences(lab, steps, CODED_UNITS, "hold", coded), reference=full)
    curve = {"ddim": _curve(rows, whole, "relative_l2")}
    base["coded"] = {"steps": rows, "skipping": _judged(silences, whole, curve)}
    return base


def _silences(lab: Lab, steps: int, units: Sequence[Unit], predictor: str, config: ModiffConfig) -> Plan:
    """A run for each unit and threshold."""
    rules = [SkipRule(unit=unit, threshold=t) for unit in units for t in THRESHOLDS[lab.settings.full]]
    return [
        (
            {"unit": rule.unit, "predictor": predictor, "threshold": rule.threshold},
            Run(steps=steps, spacing=SPACING, config=config, skip=rule),
        )
        for rule in rules
    ]


def _curve(rows: Sequence[Row], whole: float, key: str) -> Curve:
    return [(row["gbops"] / whole, row[key]) for row in rows if row[key] is not None]


def _judged(rows: Sequence[Row], whole: float, steps: dict[str, Curve]) -> list[Row]:
    """The rows with their share of the operations, and the error of fewer steps at as many."""
    shares = [row["gbops"] / whole for row in rows]
    return [
        {**row, "share": share, **{f"{name}_equal": at_share(curve, share) for name, curve in steps.items()}}
        for row, share in zip(rows, shares, strict=True)
    ]


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
    """The page of `values`: tables and charts, and what they say."""
    blocks: list[Content] = []
    for base in values["bases"]:
        blocks += [_sentence(base), *_tables(base), *(_chart(base, predictor) for predictor in ("hold", "linear"))]
    return Shown(tuple(blocks), WHY)


WHY = (
    "the paper leaves the question open. Silence saves operations of layers only: norms, attention products and "
    "everything outside of the layers run at every step, and both states are kept in memory. Fewer steps save all of "
    "it and need nothing. Silence by token in convolutions counts every tap of a silent pixel as saved; no library "
    "kernel saves them, so these rows flatter it. The unit layer decides for the whole batch at once, block by the "
    "first layer of a block that runs.",
    "Errors to the same number of steps ask how well that very trajectory is followed. A sampler with fewer steps "
    "takes another one, which may lead to an image as good; the distance to the limit, many more steps of the same "
    "sampler, asks that instead.",
)
RIVALS = {
    "ddim_equal": "fewer DDIM steps",
    "dpmsolver++_equal": "fewer DPM-Solver++ steps",
    "ddim_limit_equal": "fewer DDIM steps in the distance to the limit",
    "dpmsolver++_limit_equal": "fewer DPM-Solver++ steps in the distance to the limit",
}
CERTAIN = 0.999
"""With a larger share of the operations nothing was saved."""


def _sentence(base: Row) -> str:
    """In how many settings silence beats fewer steps at equal operations."""
    wins = [f"{name} in {_wins(base['skipping'], key)}" for key, name in RIVALS.items()]
    return (
        f"{base['steps']} steps. At equal operations silence beats {'; '.join(wins)}. On top of 4-bit codes, at equal "
        f"bit-operations, it beats 4-bit codes with fewer steps in {_wins(base['coded']['skipping'], 'ddim_equal')}."
    )


def _wins(rows: Sequence[Row], key: str) -> str:
    judged = [row for row in rows if row[key] is not None and row["relative_l2"] is not None and row["share"] < CERTAIN]
    return f"{sum(beats(row, key) for row in judged)} of {len(judged)} settings"


def beats(row: Row, key: str) -> bool:
    """Whether a setting saved something, and is nearer than fewer steps with as many operations."""
    value = row["to_limit"] if "limit" in key else row["relative_l2"]
    return row[key] is not None and value is not None and row["share"] < CERTAIN and value < row[key]


def _tables(base: Row) -> list[Table]:
    """Silence, fewer steps, and both on top of 4-bit codes."""
    steps, whole = base["steps"], base["ddim"][0]["gbops"]
    caption = (
        f"Silence at {steps} DDIM steps, and the error of fewer steps with as many operations, each to {steps} steps "
        f"of its own sampler. To the limit: median over the images of the error to {base['limit_steps']} steps of it."
    )
    fewer = [{**row, "sampler": s, "share": row["gbops"] / whole} for s in SAMPLERS for row in base[s]]
    unit, rivals = (
        "unit; predictor = prediction",
        ("ddim_equal: .4f = DDIM, fewer steps; dpmsolver++_equal: .4f = DPM-Solver++, fewer steps"),
    )
    limits = (
        "to_limit: .4f = to the limit; ddim_limit_equal: .4f = DDIM, to the limit; "
        "dpmsolver++_limit_equal: .4f = DPM-Solver++, to the limit"
    )
    operations, error = "share: .1%= operations", "relative_l2: l2 = relative L2"
    bit_operations = "share: .2% = bit-operations"
    return [
        listing(
            f"study-zero-bits-{steps}",
            caption,
            base["skipping"],
            f"{unit}; threshold: g; {operations}; {error}; {rivals}; {limits}",
        ),
        listing(
            f"study-zero-bits-fewer-{steps}",
            f"Fewer steps, relative L2 to {steps} steps of the same sampler.",
            fewer,
            f"sampler; steps: d; {operations}; {error}; to_limit: .4f = to the limit",
        ),
        listing(
            f"study-zero-bits-coded-{steps}",
            "Silence on top of 4-bit codes, and 4-bit codes with fewer steps and as many bit-operations.",
            base["coded"]["skipping"],
            f"{unit}; threshold: g; {bit_operations}; {error}; ddim_equal: .4f = A4, fewer steps",
        ),
    ]


def _chart(base: Row, predictor: str) -> Figure:
    whole = base["ddim"][0]["gbops"]
    lines: list[Line] = []
    for sampler, colour in zip(SAMPLERS, (7, 4), strict=True):
        rows = [{**row, "name": f"{sampler}, fewer steps", "share": row["gbops"] / whole} for row in base[sampler]]
        lines += curves(rows, "name", "share", colours=(colour,), dashed=True)
    silences = [
        {**row, "name": f"silent by {row['unit']}"} for row in base["skipping"] if row["predictor"] == predictor
    ]
    return line_chart(
        f"study-zero-bits-{predictor}-{base['steps']}",
        [*lines, *curves(silences, "name", "share", colours=range(len(UNITS)))],
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
