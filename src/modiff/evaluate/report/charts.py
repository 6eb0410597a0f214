"""The drawn figures of a report, as SVG: error against cost, and error by layer and step."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from modiff.errors import ConfigError
from modiff.evaluate.figures import BLUE, GREEN, GREY, MOST_NAMES, ORANGE, RED, STYLE
from modiff.evaluate.layer_errors import LayerTrace
from modiff.evaluate.report.document import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

STEPS = "steps"
"""The family of the points that quantize nothing and take fewer sampler steps: every chart of cost has it."""
FAMILY_STYLES = {
    "plain": (RED, "s"),
    "uncompensated": (ORANGE, "^"),
    "modulated": (BLUE, "o"),
    "tuned": (GREEN, "D"),
}
_OTHER = (GREY, "v")
_FLOOR = 1e-7  # below is float32's own rounding


@dataclass(frozen=True)
class Point:
    """A configuration in a chart of cost: error with its interval over a cost. family: STEPS, or one of FAMILY_STYLES.

    label: short, stands beside the point. error None: nothing to show, for example a run that diverged.
    """

    label: str
    family: str
    cost: float
    error: float | None
    low: float | None = None
    high: float | None = None


def pareto(name: str, points: Sequence[Point], *, cost: str, error: str, caption: str) -> Figure:
    """Error against cost, both on log scales, lower left is better; *fewer sampler steps* are always drawn in.

    Args:
        cost, error: what the axes say. A point with error 0 (full precision against itself) is a vertical line.
    Raises: ConfigError without at least one run of fewer sampler steps: a method that they beat would look good alone.
    """
    steps = [p for p in points if p.family == STEPS]
    if not any(p.error for p in steps):
        labels = ", ".join(p.label for p in points)
        raise ConfigError(
            f"{name}: expected a run with fewer sampler steps among the points, got {labels or 'no points'}. They "
            "are the simplest way to make a sampler cheaper. Add one, for example half the steps."
        )
    alt = f"{error} against {cost}. " + "; ".join(
        f"{p.label if p.family == STEPS else f'{p.family} {p.label}'} costs {p.cost:.3g}, "
        + ("not finite" if p.error is None else f"error {p.error:.3g}")
        for p in points
    )
    return Figure(
        name, alt, caption, _svg(lambda drawing: _draw_pareto(drawing, points, cost, error)), "svg", half=True
    )


def _draw_pareto(drawing: Drawing, points: Sequence[Point], cost: str, error: str) -> None:
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
    axis.set_ylabel(_plain(error))
    line = sorted((p.cost, p.error) for p in points if p.family == STEPS and p.error)
    axis.plot(*zip(*line, strict=True), color="black", linestyle="--", marker="x", label="fewer sampler steps")
    for point in points:
        if point.family == STEPS and point.error == 0:
            axis.axvline(
                point.cost, color="black", linestyle=":", linewidth=1.2, label=_plain(f"{point.label} (error 0)")
            )
    families = dict.fromkeys(p.family for p in points if p.family != STEPS)
    for family in families:
        color, marker = FAMILY_STYLES.get(family, _OTHER)
        found = [(p.cost, p.error) for p in points if p.family == family and p.error]
        if found:
            axis.plot(*zip(*found, strict=True), color=color, marker=marker, linestyle="none", label=_plain(family))
    for point in points:
        _annotate(axis, point)
    axis.tick_params(which="minor", labelsize=8)
    axis.margins(x=0.18, y=0.12)  # room for the names
    axis.legend(loc="best", fontsize=9)


def _annotate(axis: Axes, point: Point) -> None:
    if not point.error:
        return
    color = "black" if point.family == STEPS else FAMILY_STYLES.get(point.family, _OTHER)[0]
    if point.low is not None and point.high is not None and point.high > 0:
        low = max(point.low, point.error / 1e3)  # a log scale has no zero
        axis.vlines(point.cost, min(low, point.error), max(point.high, point.error), color=color, linewidth=1)
    axis.annotate(_plain(point.label), (point.cost, point.error), xytext=(6, 4), textcoords="offset points", fontsize=8,
                  color=color)  # fmt: skip


def layer_map(layers: Sequence[LayerTrace], caption: str) -> Figure:
    """Heat map of the output's relative L2 error, layers down and steps across."""
    names = [layer["name"] + (f" (call {layer['call'] + 1})" if layer["call"] else "") for layer in layers]
    worst = max(layers, key=lambda layer: max(step["output_relative_l2"] for step in layer["steps"]))
    alt = (
        f"Heat map of the relative error of {len(names)} layers over {max(len(x['steps']) for x in layers)} steps. "
        f"The largest is at {worst['name']}: {max(step['output_relative_l2'] for step in worst['steps']):.3g}."
    )
    return Figure("layer-errors", alt, caption, _svg(lambda drawing: _draw_layers(drawing, layers, names)), "svg")


def _draw_layers(drawing: Drawing, layers: Sequence[LayerTrace], names: Sequence[str]) -> None:
    values = np.full((len(layers), 1 + max(step["step"] for layer in layers for step in layer["steps"])), np.nan)
    for i, layer in enumerate(layers):
        for step in layer["steps"]:
            error = step["output_relative_l2"]
            values[i, step["step"]] = np.log10(error) if error > _FLOOR else np.nan
    drawing.set_size_inches(10, max(3.0, 0.19 * min(len(names), MOST_NAMES * 2) + 1.2))
    axis = drawing.subplots()
    shown = axis.imshow(values, aspect="auto", interpolation="nearest", cmap="magma")
    drawing.colorbar(shown, ax=axis, label="log10 of the relative L2 error of the layer's output")
    every = -(-len(names) // (MOST_NAMES * 2))
    axis.set_yticks(range(0, len(names), every), [_plain(name) for name in names[::every]], fontsize=8)
    axis.set_xlabel("step (0 = first, anchored)")
    axis.grid(visible=False)


def _plain(text: str) -> str:
    """A name as it was typed: matplotlib sets what stands between two dollars as mathematics."""
    return text.replace("$", r"\$")


def _svg(draw: Callable[[Drawing], None]) -> bytes:
    """An SVG file on white; the same drawing gives the same bytes."""
    import matplotlib  # imported late: importing modiff must not load it
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Drawing

    buffer = io.BytesIO()
    with matplotlib.rc_context(rc=STYLE | {"svg.hashsalt": "modiff"}):
        drawing = Drawing(layout="constrained")
        FigureCanvasSVG(drawing)
        draw(drawing)
        drawing.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
