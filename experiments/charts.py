"""The figures of the study: lines over one axis, as PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modiff.evaluate.analysis.drawing import BLUE, GREEN, GREY, ORANGE, RED, STYLE
from modiff.evaluate.report.document import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

DPI = 110
MOST_TICKS = 10
"""Whole numbers up to which each has a tick of its own."""
COLOURS = (BLUE, RED, GREEN, ORANGE, GREY, "#56B4E9", "#CC79A7", "#000000")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")


@dataclass(frozen=True, kw_only=True)
class Line:
    """Points joined in order of x; those without a y are left out. band: lower and upper edge at each x.

    level: the y of a horizontal line, in the place of points. dashed: for what is compared with.
    """

    label: str
    x: Sequence[float] = ()
    y: Sequence[float | None] = ()
    band: tuple[Sequence[float], Sequence[float]] | None = None
    level: float | None = None
    dashed: bool = False
    marked: bool = True
    colour: int | None = None


@dataclass(frozen=True, kw_only=True)
class _Axes:
    """What the axes say, and their scales."""

    title: str
    x: str
    y: str
    log_x: bool
    log_y: bool
    falling: bool


def line_chart(
    name: str,
    lines: Sequence[Line],
    *,
    title: str,
    x: str,
    y: str,
    caption: str,
    log_x: bool = False,
    log_y: bool = True,
    falling: bool = False,
    half: bool = False,
) -> Figure:
    """A chart of lines; the alt text is their first and last values.

    Args:
        x, y: what the axes say. falling: x from large to small, as bits do. half: two stand side by side.
    """
    data = _picture(lines, _Axes(title=title, x=x, y=y, log_x=log_x, log_y=log_y, falling=falling))
    return Figure(name, f"{y} over {x}. {_alt(lines)}", caption, data, half=half)


def _picture(lines: Sequence[Line], axes: _Axes) -> bytes:
    """The bytes of a PNG file."""
    import matplotlib  # imported late: importing modiff must not load it
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Drawing

    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        drawing = Drawing(figsize=(6.4, 4.6), layout="constrained", dpi=DPI)
        FigureCanvasAgg(drawing)
        axis = drawing.subplots()
        shown = [value for i, line in enumerate(lines) for value in _draw(axis, line, i, axes.log_y)]
        if axes.log_y and shown:
            axis.set_yscale("log")
            axis.set_ylim(min(shown) / 1.6, max(shown) * 1.6)
            _plain_numbers(axis.yaxis)
        if axes.log_x:
            axis.set_xscale("log")
            _plain_numbers(axis.xaxis)
        places = sorted({x for line in lines for x in line.x})
        if places and len(places) <= MOST_TICKS and all(float(x).is_integer() for x in places):
            axis.set_xticks(places, [f"{x:g}" for x in places])
            axis.set_xticks([], minor=True)
        if axes.falling:
            axis.invert_xaxis()
        axis.set_title(axes.title)
        axis.set_xlabel(axes.x)
        axis.set_ylabel(axes.y)
        if lines:
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, fontsize=9)
        drawing.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _plain_numbers(axis: Axis) -> None:
    """0.1 and not a power with an exponent; 0.2 and 0.5 as well where few tens are in sight."""
    from matplotlib.ticker import FuncFormatter

    low, high = sorted(axis.get_view_interval())
    few = high < 30 * low

    def minor(value: float, _: object) -> str:
        leading = f"{value:e}"[0]
        return f"{value:g}" if few and leading in "25" else ""

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(FuncFormatter(minor))


def _draw(axis: Axes, line: Line, index: int, log_y: bool) -> list[float]:
    """Draw one line; the values that the axis must hold."""
    which = index if line.colour is None else line.colour
    colour, style = COLOURS[which % len(COLOURS)], "--" if line.dashed else "-"
    if line.level is not None:
        axis.axhline(line.level, color=colour, linestyle=style, label=line.label)
        return [line.level] if line.level > 0 or not log_y else []
    points = sorted((a, b) for a, b in zip(line.x, line.y, strict=True) if b is not None and (b > 0 or not log_y))
    marker = MARKERS[which % len(MARKERS)] if line.marked else ""
    axis.plot(
        [p[0] for p in points], [p[1] for p in points], color=colour, linestyle=style, marker=marker, label=line.label
    )
    if line.band is not None:
        axis.fill_between(line.x, *line.band, color=colour, alpha=0.2, linewidth=0)
    return [p[1] for p in points]


def _alt(lines: Sequence[Line]) -> str:
    parts: list[str] = []
    for line in lines:
        known = sorted((a, b) for a, b in zip(line.x, line.y, strict=True) if b is not None)
        if line.level is not None:
            parts.append(f"{line.label}: {line.level:.3g} throughout")
        elif known:
            parts.append(
                f"{line.label}: {known[0][1]:.3g} at {known[0][0]:.3g}, {known[-1][1]:.3g} at {known[-1][0]:.3g}"
            )
        else:
            parts.append(f"{line.label}: no figures")
    return "; ".join(parts) + "."
