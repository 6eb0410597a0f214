"""Rows, table and plot of the loop benchmark."""

import json
import statistics
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from loop.rounds import Record
from modiff.evaluate.analysis.figures import BLUE, GREY, ORANGE, file_bytes, log_numbers, name_points
from modiff.evaluate.metrics.paired import relative_l2
from modiff.files import write_atomically

FIELDS = ("model", "variant", "isa", "threads", "seconds_min", "seconds_median", "seconds_first", "seconds_step",
          "relative_l2", "peak_mib", "state_mib", "commit", "machine", "command")  # fmt: skip
FLOOR = 1e-4
"""Relative L2 up to which only the order of float sums differs: such points stand on the lower edge of the plot."""
NOTES = """\
Seconds: whole loops; min and median of the rounds. First, step: the first step, and the fastest later one in median.
Relative L2: to fp32-eager from the same noise. Peak: of the process while it loops, libraries included.
State: what the variant keeps from step to step."""


def row_of(record: Record, reference: np.ndarray | None, head: Mapping[str, str]) -> dict[str, Any] | None:
    """The JSON line of a variant; None for one that finished no loop. `head`: commit, machine, command."""
    if not record.rounds:
        return None
    seconds, last = record.seconds(), record.rounds[-1]
    first, step = steps_of(record)
    return {
        "model": record.task.model.name,
        "variant": record.task.variant,
        "isa": record.facts["isa"],
        "threads": record.facts["threads"],
        "seconds_min": min(seconds),
        "seconds_median": statistics.median(seconds),
        "seconds_first": first,
        "seconds_step": step,
        "relative_l2": error_of(last["images"], reference),
        "peak_mib": max(r["peak_mib"] for r in record.rounds),
        "state_mib": last["state_mib"],
        "commit": head["commit"],
        "machine": head["machine"],
        "command": f"{head['command']}  # {record.task.model.note(record.task.timed)}",
    }


def error_of(images: np.ndarray, reference: np.ndarray | None) -> float | None:
    """Relative L2; None without a reference, or where either holds what is no number."""
    if reference is None or not np.isfinite(images).all() or not np.isfinite(reference).all():
        return None
    return relative_l2(images, reference)


def append_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON line a row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def table(records: list[Record], rows: Mapping[str, dict[str, Any]]) -> str:
    """Aligned text: a line for each variant, also for those that did not run."""
    first = records[0].task
    lines = [
        first.model.note(first.timed),
        f"{'':<21}{'seconds':>10}{'median':>10}{'first':>9}{'step':>9}{'rel. L2':>10}{'peak MiB':>10}{'state MiB':>11}",
    ]
    for record in records:
        row = rows.get(record.task.variant)
        if row is None:
            lines.append(f"{record.task.variant:<21}not run: {record.reason}")
            continue
        error = "-" if row["relative_l2"] is None else f"{row['relative_l2']:.4f}"
        lines.append(
            f"{record.task.variant:<21}{row['seconds_min']:>10.3f}{row['seconds_median']:>10.3f}"
            f"{row['seconds_first']:>9.4f}{row['seconds_step']:>9.4f}{error:>10}{row['peak_mib']:>10.0f}{row['state_mib']:>11.1f}"
            + (f"  stopped: {record.reason}" if record.reason else "")
            + (f"  {record.facts['note']}" if record.facts["note"] else "")
        )
    lines += [note for record in records for note in drift(record)]
    if first.model.random_weights:
        lines.append("Random weights: read the seconds; relative L2 says nothing about trained weights.")
    return "\n".join([*lines, NOTES])


def steps_of(record: Record) -> tuple[float, float]:
    """(first step, a later step in median), of the fastest loop."""
    fastest = min(record.rounds, key=lambda r: r["seconds"])["steps"]
    return fastest[0], statistics.median(fastest[1:] or fastest)


def drift(record: Record) -> list[str]:
    """How the variant that ran in every wave changed from wave to wave."""
    waves = sorted(set(record.waves))
    before = min(record.seconds(waves[0])) if waves else 0.0
    ratios = {wave + 1: min(record.seconds(wave)) / before for wave in waves[1:]}
    return [f"{record.task.variant}, wave {wave}: {ratio:.2f}x its time in wave 1" for wave, ratio in ratios.items()]


def pareto(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (seconds, error) that no other one beats in both, from fast to exact."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def plot(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Error against seconds, one named point a variant, and the line of the best; FLOOR is the lower edge."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = file_bytes(lambda drawing: draw(drawing, rows, title), "png")
    write_atomically(path, lambda file: file.write(data))


def draw(drawing: Figure, rows: list[dict[str, Any]], title: str) -> None:
    """The plot; see `plot`."""
    drawing.set_size_inches(7.5, 5.2)
    axes = drawing.subplots()
    axes.set(xscale="log", yscale="log", xlabel="seconds a loop, fastest round", ylabel="relative L2 to fp32-eager")
    axes.set_title(textwrap.fill(title, 90), fontsize=9)
    points = [(row["variant"], row["seconds_min"], max(row["relative_l2"] or 0.0, FLOOR)) for row in rows]
    best = pareto((seconds, error) for _, seconds, error in points)
    if len(best) > 1:
        axes.step(*zip(*best, strict=True), where="post", color=ORANGE, linewidth=1, zorder=1,
                  label="nothing is faster and closer")  # fmt: skip
    edge = f"{FLOOR:g} or less, or not known"
    for marker, color, label, shown in (
        ("o", BLUE, "measured", [(x, y) for _, x, y in points if y > FLOOR]),
        ("v", GREY, edge, [(x, y) for _, x, y in points if y == FLOOR]),
    ):
        if shown:
            axes.plot(*zip(*shown, strict=True), marker, color=color, label=label)
    axes.margins(x=0.15, y=0.12)  # room for the names
    for axis in (axes.xaxis, axes.yaxis):
        log_numbers(axis)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, fontsize=9)
    name_points(axes, [(name, x, y, BLUE if y > FLOOR else GREY) for name, x, y in points], size=9)
