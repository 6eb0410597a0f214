"""The figures of a report: error against cost, error by layer and step, images and where they differ."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from modiff.evaluate.analysis.figures import FAMILY_STYLES, as_typed, file_bytes, layer_map, log_numbers, name_points
from modiff.evaluate.analysis.layers import LayerTrace
from modiff.evaluate.report.document import Figure
from modiff.evaluate.suite.plans import STEPS
from modiff.generate.pictures import grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

COLUMNS, MOST_IMAGES = 3, 6
"""Images next to each other, which are then 96 pixels wide on a phone too, and in all."""
GAIN = 8
"""Of the colours of a difference, the same in every one: what they tell can be compared."""


@dataclass(frozen=True)
class Point:
    """A configuration in a chart of cost: error with its interval over a cost. family: STEPS, or one of FAMILY_STYLES.

    label: short, stands at the point. error None: nothing to show, for example a run that diverged.
    """

    label: str
    family: str
    cost: float
    error: float | None
    low: float | None = None
    high: float | None = None

    @property
    def style(self) -> tuple[str, str]:
        """Colour and marker."""
        return FAMILY_STYLES.get(self.family, FAMILY_STYLES["config"])


def pareto(name: str, points: Sequence[Point], *, cost: str, error: str, caption: str) -> Figure:
    """Error against cost, both on log scales, lower left is better; *fewer sampler steps* are always drawn in."""
    alt = f"{error} against {cost}. " + "; ".join(
        f"{p.label if p.family == STEPS else f'{p.family} {p.label}'} costs {p.cost:.3g}, "
        + ("not finite" if p.error is None else f"error {p.error:.3g}")
        for p in points
    )
    data = file_bytes(lambda drawing: draw_pareto(drawing, points, cost, error), "svg")
    return Figure(name, alt, caption, data, "svg", half=True)


def draw_pareto(drawing: Drawing, points: Sequence[Point], cost: str, error: str) -> None:
    """The chart; what diverged is left out. Full precision, whose error is 0, stands at the lower edge."""
    drawing.set_size_inches(4.8, 4.8)
    axis = drawing.subplots()
    axis.set(xscale="log", yscale="log", xlabel=cost, ylabel=as_typed(error))
    floor = min((p.error for p in points if p.error), default=1.0) / 2
    shown = [(p, p.error or floor) for p in points if p.error or (p.family == STEPS and p.error == 0)]
    labels = {p.family: as_typed(p.family) for p, _ in shown if p.family != STEPS}
    for point, height in shown:
        (colour, marker), label = point.style, labels.pop(point.family, None)  # the first of a family has its name
        axis.plot(point.cost, height, color=colour, marker=marker, linestyle="none", label=label)
        if point.low is not None and point.high:  # a log scale has no zero
            low = max(point.low, height / 1e3)
            axis.vlines(point.cost, min(low, height), max(point.high, height), color=colour, linewidth=1)
    steps = sorted((p.cost, height) for p, height in shown if p.family == STEPS)
    if len(steps) > 1:
        costs, heights = zip(*steps, strict=True)
        axis.step(costs, list(itertools.accumulate(heights, min)), color="black", linestyle="--", where="post",
                  label="fewer sampler steps")  # fmt: skip
    axis.margins(x=0.18, y=0.12)  # room for the names
    for direction in (axis.xaxis, axis.yaxis):
        log_numbers(direction)
    if axis.get_legend_handles_labels()[1]:
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=10)
    name_points(axis, [(p.label + " (error 0)" * (p.error == 0), p.cost, y, p.style[0]) for p, y in shown])


def layer_figure(layers: Sequence[LayerTrace], caption: str) -> Figure:
    """Map of the output's relative L2 error, layers down and steps across."""
    worst = max(layers, key=lambda layer: max(step["output_relative_l2"] for step in layer["steps"]))
    alt = (
        f"Heat map of the relative error of {len(layers)} layers over {max(len(x['steps']) for x in layers)} steps. "
        f"The largest is at {worst['name']}: {max(step['output_relative_l2'] for step in worst['steps']):.3g}."
    )

    def draw(drawing: Drawing) -> None:
        drawing.set_figwidth(10)
        layer_map(drawing.subplots(), layers, label="relative L2 error of the layer's output")

    return Figure("layer-errors", alt, caption, file_bytes(draw, "svg"), "svg")


def image_figures(rows: Sequence[tuple[str, np.ndarray]], seed: int) -> list[Figure]:
    """The images of each configuration, and next to them their differences to the first one, full precision.
    rows: (name, images uint8 (N, H, W, C)) with the same seeds in every row. seed: of the first image.
    """
    (reference_name, images), *others = rows
    reference = images[: min(len(images) // COLUMNS * COLUMNS or len(images), MOST_IMAGES)]
    count = len(reference)
    seeds = f"seeds {seed} to {seed + count - 1}"
    alt = f"{count} images of {reference_name}, {seeds}."
    figures = [Figure("images-0", alt, f"{reference_name}, {seeds}", _block(reference / 255), pixels=True)]
    for i, (name, others_images) in enumerate(others, 1):
        images = others_images[:count]
        largest = int(np.abs(images.astype(np.int64) - reference).max())
        alt = f"{count} images of configuration {name}, {seeds}."
        change = f"Difference of {name} to {reference_name}, {GAIN} times as strong; the largest is {largest} of 255."
        figures += [
            Figure(f"images-{i}", alt, name, _block(images / 255), pixels=True, half=True),
            Figure(f"difference-{i}", change, change, _block(differences(images, reference)), pixels=True, half=True),
        ]
    return figures


def differences(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """GAIN times the difference of the channels' means (N, H, W, 3) in [0, 1]: red above, blue below, white equal."""
    change = (images.astype(np.float64) - reference.astype(np.float64)).mean(axis=-1) / 255
    scaled = (change * GAIN).clip(-1, 1)
    red, blue = 1 + scaled.clip(max=0), 1 - scaled.clip(min=0)
    return np.stack([red, 1 - np.abs(scaled), blue], axis=-1)


def _block(images: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    rows = [("", images[i : i + COLUMNS]) for i in range(0, len(images), COLUMNS)]
    grid(rows).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
