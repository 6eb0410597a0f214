"""The conclusion of a suite in one sentence: what its intervals tell apart, and what they do not."""

from collections.abc import Sequence

from modiff.evaluate.analysis.findings import listed
from modiff.evaluate.metrics.bootstrap import MEAN_IMAGES
from modiff.evaluate.report.document import Cell
from modiff.evaluate.suite.judge import Measurement
from modiff.evaluate.suite.plans import STEPS
from modiff.evaluate.suite.run import Row, Suite

_SIDES = {-1: "{} closer", 1: "{} further away", 0: "cannot be told apart from it"}


def conclusion(suite: Suite) -> str:
    """Which configurations are closer to full precision than half of the steps, or further away, or neither.

    Closer and further: the 95 % intervals do not overlap. The same against real images, where there are some, with full
    precision as the rival; then what is not usable, and what the clock says, if integers were computed with.
    """
    full, *others = suite.rows
    half = next((row for row in others if row.plan.family == STEPS), None)
    quantized = [row for row in others if row.plan.config is not None]
    if half is None or not quantized:
        return "Nothing was quantized here: the rows compare numbers of steps alone."
    count = suite.settings["num_images"]
    lost = [row for row in quantized if row.broken or (row.metric("relative_l2") or {"value": 0})["value"] is None]
    usable = [row for row in quantized if row not in lost]
    clauses = [_compared(usable, half, "relative_l2", f"{half.plan.name} (relative L2 to full precision {{}})")]
    if full.metric("fd_to_reference"):
        clauses.append(_compared(usable, full, "fd_to_reference", "full precision (distance to the real images {})"))
    clauses += [f"{row.plan.name}: not usable, error not finite" for row in lost]
    head = f"From {'only ' * (count < MEAN_IMAGES)}{count} images a row, by 95 % intervals: "
    return f"{head}{'; '.join([*clauses, _timed(quantized, full, half)])}."


def _compared(rows: Sequence[Row], rival: Row, name: str, words: str) -> str:
    """A clause. words: the rival, with room for its figure."""
    pairs = [(row.plan.name, m) for row in rows if (m := row.metric(name)) and m["value"] is not None]
    pairs.sort(key=lambda pair: pair[1]["value"] or 0.0)
    other = rival.metric(name)
    if other is None or not pairs:
        return f"no figure compares the configurations with {rival.plan.name}"
    groups = {side: [pair for pair in pairs if _side(pair[1], other) == side] for side in _SIDES}
    told: list[str] = []
    for side, group in groups.items():
        if group:
            figures = [f"{name} ({_figure(m)})" for name, m in group]
            told.append(f"{listed(figures)} {_SIDES[side].format('is' if len(group) == 1 else 'are')}")
    return f"against {words.format(_figure(other))}, {listed(told)}"


def _side(one: Measurement, other: Measurement) -> int:
    """-1 where the interval of `one` lies below that of `other`, 1 above, 0 where they overlap or one is unknown."""
    low, high, least, most = one["low"], one["high"], other["low"], other["high"]
    if low is None or high is None or least is None or most is None:
        return 0
    return (low > most) - (high < least)


def _figure(m: Measurement) -> str:
    cell = Cell.number(m["value"], ".3g", m["low"], m["high"])
    return f"{cell.text} {cell.detail}".strip()


def _timed(quantized: Sequence[Row], full: Row, half: Row) -> str:
    """The fastest configuration on integers; seconds of simulated ones say nothing."""
    real = [row for row in quantized if row.plan.config and row.plan.config.layer.execution == "integer"]
    if not real:
        return "integers were simulated in floats here, so nothing was faster than full precision"
    rows = [row for row in (full, half, *real) if not row.broken]
    times = {row.plan.name: m["value"] for row in rows if (m := row.metric("seconds")) and m["value"]}
    fastest = min((row.plan.name for row in real if row.plan.name in times), key=times.__getitem__, default=None)
    if fastest is None or len({full.plan.name, half.plan.name} & set(times)) < 2:
        return "no times were measured"
    took, halved = (times[name] / times[full.plan.name] for name in (fastest, half.plan.name))
    return f"{fastest} took {took:.2f} of full precision's time, {half.plan.name} {halved:.2f} of it, each timed once"
