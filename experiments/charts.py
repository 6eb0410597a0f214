"""The figures of the experiments: lines over one axis, as PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modiff.evaluate.analysis.figures import BLUE, GREEN, GREY, ORANGE, RED, STYLE
from modiff.evaluate.report.document import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

DPI = 110
COLOURS = (BLUE, RED, GREEN, ORANGE, GREY, "#56B4E9", "#CC79A7", "#000000")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")


@dataclass(frozen=True, kw_only=True)
class Line:
    """Points joined in order of x; those without a y are left out. band: lower and upper edge at each x.

    level: the y of a horizontal line without points. dashed: for what is compared with.
    """

    label: str
    x: Sequence[float] = ()
    y: Sequence[float | None] = ()
    band: tuple[Sequence[float], Sequence[float]] | None = None
    level: float | None = None
    dashed: bool = False
    marked: bool = True
    colour: int | None = None


def curves(
    rows: Sequence[Mapping[str, Any]],
    label: str,
    x: str,
    y: str = "relative_l2",
    *,
    colours: Sequence[int | None] = (),
    dashed: bool = False,
) -> list[Line]:
    """A line for each value of the field `label`, through the fields `x` and `y` of its rows."""
    lines: list[Line] = []
    for i, name in enumerate(dict.fromkeys(row[label] for row in rows)):
        own = [row for row in rows if row[label] == name]
        points = {"x": [row[x] for row in own], "y": [row[y] for row in own]}
        lines.append(Line(label=str(name), **points, colour=colours[i] if colours else None, dashed=dashed))
    return lines


def line_chart(
    name: str,
    lines: Sequence[Line],
    *,
    title: str,
    x: str,
    y: str = "relative L2 to full precision",
    caption: str,
    log_x: bool = False,
    falling: bool = False,
    half: bool = False,
) -> Figure:
    """A chart of lines; the alt text is their first and last values.

    Args:
        x, y: what the axes say. falling: x from large to small, as bits do. half: two stand side by side.
    """
    data = _picture(lines, (title, x, y), log_x, falling)
    return Figure(name, f"{y} over {x}. {_alt(lines)}", caption, data, half=half)


def _picture(lines: Sequence[Line], texts: tuple[str, str, str], log_x: bool, falling: bool) -> bytes:
    """The bytes of a PNG file. texts: title, x axis, y axis."""
    import matplotlib  # imported late: importing an experiment must not load it
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Drawing

    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        drawing = Drawing(figsize=(6.4, 4.6), layout="constrained", dpi=DPI)
        FigureCanvasAgg(drawing)
        axis = drawing.subplots()
        shown = [value for i, line in enumerate(lines) for value in _draw(axis, line, i)]
        if shown:
            axis.set_yscale("log")
            axis.set_ylim(min(shown) / 1.6, max(shown) * 1.6)
            _plain_numbers(axis.yaxis)
        if log_x:
            axis.set_xscale("log")
            _plain_numbers(axis.xaxis)
        ticks = sorted({x for line in lines for x in line.x})
        if ticks and len(ticks) <= 10 and all(float(x).is_integer() for x in ticks):
            axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
            axis.set_xticks([], minor=True)
        if falling:
            axis.invert_xaxis()
        axis.set(title=texts[0], xlabel=texts[1], ylabel=texts[2])
        if lines:
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, fontsize=9)
        drawing.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _plain_numbers(axis: Axis) -> None:
    """0.1 and not a power with an exponent; 0.2 and 0.5 as well where few tens are in sight."""
    from matplotlib.ticker import FuncFormatter

    low, high = sorted(axis.get_view_interval())
    minor = "25" if high < 30 * low else ""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in minor else ""))


def _draw(axis: Axes, line: Line, index: int) -> list[float]:
    """Draw one line; the values that the axis must hold."""
    which = index if line.colour is None else line.colour
    colour, style = COLOURS[which % len(COLOURS)], "--" if line.dashed else "-"
    if line.level is not None:
        axis.axhline(line.level, color=colour, linestyle=style, label=line.label)
        return [line.level] if line.level > 0 else []
    points = [(a, b) for a, b in _known(line) if b > 0]
    marker = MARKERS[which % len(MARKERS)] if line.marked else ""
    axis.plot(
        [p[0] for p in points], [p[1] for p in points], color=colour, linestyle=style, marker=marker, label=line.label
    )
    if line.band is not None:
        axis.fill_between(line.x, *line.band, color=colour, alpha=0.2, linewidth=0)
    return [p[1] for p in points]


def _known(line: Line) -> list[tuple[float, float]]:
    return sorted((a, b) for a, b in zip(line.x, line.y, strict=True) if b is not None)


def _alt(lines: Sequence[Line]) -> str:
    parts: list[str] = []
    for line in lines:
        known = _known(line)
        if line.level is not None:
            parts.append(f"{line.label}: {line.level:.3g} throughout")
        elif known:
            first, last = known[0], known[-1]
            parts.append(f"{line.label}: {first[1]:.3g} at {first[0]:.3g}, {last[1]:.3g} at {last[0]:.3g}")
        else:
            parts.append(f"{line.label}: no figures")
    return "; ".join(parts) + "."
