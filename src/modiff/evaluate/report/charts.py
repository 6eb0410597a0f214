"""The figures of a report: error against cost, error by layer and step, images and where they differ."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from modiff.evaluate.analysis.figures import FAMILY_STYLES, GREY, as_typed, file_bytes, layer_map, log_error, map_height
from modiff.evaluate.analysis.layers import LayerTrace
from modiff.evaluate.report.document import Figure
from modiff.evaluate.suite.plans import STEPS
from modiff.generate.pictures import grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

MOST_IMAGES = 8
"""Columns of a strip: more would be too small to see."""
GAIN = 8
"""Of the colours of a difference."""


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
        return ("black", "x") if self.family == STEPS else FAMILY_STYLES.get(self.family, (GREY, "v"))


def pareto(name: str, points: Sequence[Point], *, cost: str, error: str, caption: str) -> Figure:
    """Error against cost, both on log scales, lower left is better; *fewer sampler steps* are always drawn in.

    Args:
        cost, error: what the axes say. A point with error 0 (full precision against itself) is a vertical line.
    """
    alt = f"{error} against {cost}. " + "; ".join(
        f"{p.label if p.family == STEPS else f'{p.family} {p.label}'} costs {p.cost:.3g}, "
        + ("not finite" if p.error is None else f"error {p.error:.3g}")
        for p in points
    )
    data = file_bytes(lambda drawing: draw_pareto(drawing, points, cost, error), "svg")
    return Figure(name, alt, caption, data, "svg", half=True)


def draw_pareto(drawing: Drawing, points: Sequence[Point], cost: str, error: str) -> None:
    """The chart; what diverged is left out."""
    from matplotlib.ticker import LogLocator  # imported late: importing modiff must not load it

    drawing.set_size_inches(6.4, 4.8)
    axis = drawing.subplots()
    axis.set_xscale("log")
    axis.set_yscale("log")
    for direction in (axis.xaxis, axis.yaxis):  # 200, 500, 1000: powers of ten alone are too few
        direction.set_minor_locator(LogLocator(subs=(2, 5)))
        direction.set_minor_formatter("{x:g}")
        direction.set_major_formatter("{x:g}")
    axis.set_xlabel(cost)
    axis.set_ylabel(as_typed(error))
    for family in dict.fromkeys([STEPS, *(p.family for p in points)]):
        members = [p for p in points if p.family == family and p.error]
        if members:
            line = sorted((p.cost, p.error) for p in members)
            colour, marker = members[0].style
            label, stroke = ("fewer sampler steps", "--") if family == STEPS else (as_typed(family), "none")
            axis.plot(*zip(*line, strict=True), color=colour, marker=marker, linestyle=stroke, label=label)
    for point in points:
        if point.family == STEPS and point.error == 0:
            label = as_typed(f"{point.label} (error 0)")
            axis.axvline(point.cost, color="black", linestyle=":", linewidth=1.2, label=label)
        if point.error:
            _annotate(axis, point, point.error)
    axis.tick_params(which="minor", labelsize=8)
    axis.margins(x=0.18, y=0.12)  # room for the names
    axis.legend(loc="best", fontsize=9)


def _annotate(axis: Axes, point: Point, error: float) -> None:
    colour = point.style[0]
    if point.low is not None and point.high is not None and point.high > 0:
        low = max(point.low, error / 1e3)  # a log scale has no zero
        axis.vlines(point.cost, min(low, error), max(point.high, error), color=colour, linewidth=1)
    axis.annotate(as_typed(point.label), (point.cost, error), xytext=(6, 4), textcoords="offset points", fontsize=8,
                  color=colour)  # fmt: skip


def layer_figure(layers: Sequence[LayerTrace], caption: str) -> Figure:
    """Map of the output's relative L2 error, layers down and steps across."""
    worst = max(layers, key=lambda layer: max(step["output_relative_l2"] for step in layer["steps"]))
    alt = (
        f"Heat map of the relative error of {len(layers)} layers over {max(len(x['steps']) for x in layers)} steps. "
        f"The largest is at {worst['name']}: {max(step['output_relative_l2'] for step in worst['steps']):.3g}."
    )

    def draw(drawing: Drawing) -> None:
        drawing.set_size_inches(10, map_height(layers))
        label = "log10 of the relative L2 error of the layer's output"
        layer_map(drawing.subplots(), layers, log_error, label, "magma")

    return Figure("layer-errors", alt, caption, file_bytes(draw, "svg"), "svg")


def image_figures(rows: Sequence[tuple[str, np.ndarray]], seed: int) -> list[Figure]:
    """A strip of images for each configuration, and next to it one of differences to the first, full precision.
    rows: (name, images uint8 (N, H, W, C)) with the same seeds in every row. seed: of the first image.
    """
    (reference_name, images), *others = rows
    reference = images[:MOST_IMAGES]
    count = len(reference)
    seeds = f"seeds {seed} to {seed + count - 1}"
    alt = f"{count} images of {reference_name}, {seeds}."
    figures = [Figure("images-0", alt, f"{reference_name}, {seeds}", _strip(reference / 255), pixels=True)]
    for i, (name, others_images) in enumerate(others, 1):
        images = others_images[:count]
        largest = int(np.abs(images.astype(np.int64) - reference).max())
        alt = f"{count} images of configuration {name}, {seeds}."
        change = f"Difference of {name} to {reference_name}, enlarged {GAIN} times; the largest is {largest} of 255."
        figures += [
            Figure(f"images-{i}", alt, name, _strip(images / 255), pixels=True, half=True),
            Figure(f"difference-{i}", change, change, _strip(differences(images, reference)), pixels=True, half=True),
        ]
    return figures


def differences(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """GAIN times the difference of the channels' means (N, H, W, 3) in [0, 1]: red above, blue below, white equal."""
    change = (images.astype(np.float64) - reference.astype(np.float64)).mean(axis=-1) / 255
    scaled = (change * GAIN).clip(-1, 1)
    red, blue = 1 + scaled.clip(max=0), 1 - scaled.clip(min=0)
    return np.stack([red, 1 - np.abs(scaled), blue], axis=-1)


def _strip(images: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    grid([("", images)]).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
