"""What the zero-bits experiment says, from its figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.tables import listing
from experiments.words import between, error, number, times
from modiff.evaluate.report.document import Table

EARLIER = (0.14, 0.011)
"""Half of the operations skipped at layer granularity, half of the steps: of a study before this one."""
CERTAIN = 0.999
"""A share of the operations above it saved nothing."""
RIVALS = {
    "ddim_equal": "fewer DDIM steps",
    "dpmsolver++_equal": "fewer DPM-Solver++ steps",
    "ddim_limit_equal": "fewer DDIM steps in the distance to the limit",
    "dpmsolver++_limit_equal": "fewer DPM-Solver++ steps in the distance to the limit",
}

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

Row = dict[str, Any]
Rows = Sequence[Row]


def found_text(base: Row) -> str:
    """Where silence beats fewer steps at equal operations, and what half of the operations cost."""
    rows = base["skipping"]
    verdicts = "; ".join(_verdict(rows, key, name) for key, name in RIVALS.items())
    return (
        f"{base['steps']} steps. At equal operations silence beats {verdicts}. {_half_text(base['half'])} "
        f"{_linear(rows)} On top of 4-bit codes, at equal bit-operations, silence beats "
        f"{_verdict(base['coded']['skipping'], 'ddim_equal', '4-bit codes with fewer steps')}."
    )


def beats(row: Row, key: str) -> bool:
    """Whether a setting saved something, and is nearer than fewer steps with as many operations."""
    value = row["to_limit"] if "limit" in key else error(row)
    return row[key] is not None and value is not None and row["share"] < CERTAIN and value < row[key]


def _verdict(rows: Rows, key: str, name: str) -> str:
    """In how many settings silence wins, and in which."""
    judged = [row for row in rows if row[key] is not None and error(row) is not None and row["share"] < CERTAIN]
    wins = [row for row in judged if beats(row, key)]
    groups: dict[str, list[float]] = {}
    for row in wins:
        groups.setdefault(f"{row['unit']}, {row['predictor']}", []).append(1 - row["share"])
    if not judged:
        return f"{name} nowhere: none could be compared"
    if len(wins) == len(judged):
        return f"{name} in all {len(judged)} settings"
    which = "; ".join(f"{unit}: {between(saved, '.0%')} saved" for unit, saved in groups.items())
    return f"{name} in {len(wins)} of {len(judged)} settings" + (f" ({which})" if which else "")


def _half_text(rows: Rows) -> str:
    """Half of the operations at layer granularity against half of the steps, beside what was found before."""
    before = f"{EARLIER[0]} against {EARLIER[1]}"
    row = next((r for r in rows if r["unit"] == "layer" and r["predictor"] == "hold"), None)
    if row is None or row["silence"] is None or not row["ddim_equal"]:
        return f"The earlier finding ({before}) could not be judged: no threshold left about half of the operations."
    ratio = row["silence"] / row["ddim_equal"]
    verdict = "confirmed in direction" if ratio > 1 else "refuted for this model"
    return (
        f"An earlier study on a model of 16x16 pixels found an error of {before} for half of the operations skipped "
        f"layer by layer and for half of the DDIM steps. That is {verdict}: here {number(row['silence'])} against "
        f"{number(row['ddim_equal'])}, {times(row['silence'], row['ddim_equal'])} times as much; half of the "
        f"DPM-Solver++ steps leave {number(row['dpmsolver++_equal'])}."
    )


def _linear(rows: Rows) -> str:
    """Hold against linear prediction at the smallest threshold."""
    parts: list[str] = []
    least = min(row["threshold"] for row in rows)
    for unit in dict.fromkeys(row["unit"] for row in rows):
        at = {r["predictor"]: r for r in rows if r["unit"] == unit and r["threshold"] == least}
        if len(at) == 2:
            hold, linear = at["hold"], at["linear"]
            parts.append(
                f"{unit} {number(error(hold))} with {hold['share']:.0%} of the operations, {number(error(linear))} "
                f"with {linear['share']:.0%}"
            )
    return f"Hold and then linear prediction at threshold {least:g}: {'; '.join(parts)}." if parts else ""


def tables(base: Row) -> list[Table]:
    """Silence, what it costs at half of the operations, fewer steps, and both on top of 4-bit codes."""
    steps, whole = base["steps"], base["ddim"][0]["gbops"]
    unit = [("unit", "unit", ""), ("predictor", "prediction", "")]
    rule = [*unit, ("threshold", "threshold", "g")]
    share, found = ("share", "operations", ".1%"), ("relative_l2", "relative L2", "l2")
    bits = ("share", "bit-operations", ".2%")
    rivals = [("ddim_equal", "DDIM, fewer steps", ".4f"), ("dpmsolver++_equal", "DPM-Solver++, fewer steps", ".4f")]
    to_limit = ("to_limit", "to the limit", ".4f")
    limits = [
        to_limit,
        ("ddim_limit_equal", "DDIM, to the limit", ".4f"),
        ("dpmsolver++_limit_equal", "DPM-Solver++, to the limit", ".4f"),
    ]
    caption = (
        f"Silence at {steps} DDIM steps, and the error of fewer steps with as many operations, each to {steps} steps "
        f"of its own sampler. To the limit: median over the images of the error to {base['limit_steps']} steps of it."
    )
    fewer = [
        {**row, "sampler": sampler, "share": row["gbops"] / whole}
        for sampler in ("ddim", "dpmsolver++")
        for row in base[sampler]
    ]
    coded = [{**row, "share": row["gbops"] / whole} for row in base["coded"]["steps"]]
    return [
        listing(f"study-zero-bits-{steps}", caption, base["skipping"], [*rule, share, found, *rivals, *limits]),
        listing(
            f"study-zero-bits-half-{steps}",
            "Half of the operations, between two thresholds and between two numbers of steps that were run.",
            base["half"],
            [*unit, ("silence", "silence", ".4f"), *rivals],
        ),
        listing(
            f"study-zero-bits-fewer-{steps}",
            f"Fewer steps, relative L2 to {steps} steps of the same sampler.",
            fewer,
            [("sampler", "sampler", ""), ("steps", "steps", "d"), share, found, to_limit],
        ),
        listing(
            f"study-zero-bits-coded-{steps}",
            "Silence on top of 4-bit codes, and 4-bit codes with fewer steps and as many bit-operations.",
            base["coded"]["skipping"],
            [*rule, bits, found, ("ddim_equal", "A4, fewer steps", ".4f")],
        ),
        listing(
            f"study-zero-bits-coded-steps-{steps}",
            "4-bit codes with fewer steps.",
            coded,
            [("steps", "steps", "d"), bits, found],
        ),
    ]
