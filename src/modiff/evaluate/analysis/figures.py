"""The figures of an analysis, drawn from its JSON alone, and what all figures share: colours, style, maps of layers."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from modiff.evaluate.analysis.layers import LayerTrace, StepErrors, trace_name
from modiff.evaluate.analysis.run import Analysis
from modiff.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

# Okabe and Ito's colours: apart also for the colour-blind.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#666666"
FAMILY_STYLES = {"plain": (RED, "s"), "uncompensated": (ORANGE, "^"), "modulated": (BLUE, "o"), "tuned": (GREEN, "D"),
                 "config": (GREY, "v"), "steps": ("black", "x")}  # fmt: skip
"""Colour and marker of each family of presets, of all others, and of fewer steps."""
_WAYS = np.array([(x, y) for x in (1, -1, 0.5, -0.5, 0) for y in (1, -1, 0.5, -0.5, 0) if 1 in (abs(x), abs(y))])
"""From a point to the middle of its name, in halves of the name's width and height."""
STYLE = {
    "font.size": 11, "axes.titlesize": 12, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "lines.linewidth": 2, "svg.hashsalt": "modiff",
}  # fmt: skip
WHOLE = {"integer": True, "steps": [1, 2, 5, 10]}
"""Ticks at whole numbers alone: no step is the 2.5th."""
MOST_NAMES = 80
"""Layer names that fit next to a map; above that, every second or third layer is named."""
SPAN = 100
"""Largest over smallest value of a log axis up to which 2 and 5 are named between the powers of ten."""


def file_bytes(draw: Callable[[Figure], None], kind: Literal["png", "svg"]) -> bytes:
    """A drawing on white as a file; the same drawing gives the same bytes."""
    import matplotlib  # imported late: importing modiff must not load it
    from matplotlib.figure import Figure

    buffer = io.BytesIO()
    with matplotlib.rc_context(rc=STYLE):
        figure = Figure(layout="constrained", dpi=120)
        draw(figure)
        figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def log_error(step: StepErrors) -> float:
    """log10 of a layer's output error; NaN below float32's own rounding."""
    error = step["output_relative_l2"]
    return float(np.log10(error)) if error > 1e-7 else float("nan")


def layer_map(axis: Axes, layers: Sequence[LayerTrace], value: Callable[[StepErrors], float] = log_error,
              label: str = "relative L2 error", colours: str = "magma") -> None:  # fmt: skip
    """A map of a value of every layer and step, layers down and steps across, and as high as it needs; NaN is empty."""
    table = np.full((len(layers), 1 + max(step["step"] for layer in layers for step in layer["steps"])), np.nan)
    for row, layer in zip(table, layers, strict=True):
        for step in layer["steps"]:
            row[step["step"]] = value(step)
    axis.figure.set_figheight(max(3.0, 0.19 * min(len(layers), MOST_NAMES) + 1.2))
    shown = axis.imshow(table, aspect="auto", interpolation="nearest", cmap=colours)
    form = (lambda x, _: f"{10**x:.2g}") if value is log_error else "{x:g}"  # errors, not their logarithms
    axis.figure.colorbar(shown, ax=axis, label=label, format=form)
    names = [trace_name(layer) for layer in layers]
    every = -(-len(names) // MOST_NAMES)
    axis.set_yticks(range(0, len(names), every), [as_typed(name) for name in names[::every]], fontsize=8)
    axis.set_xlabel("step (0 = first, anchored)")
    axis.locator_params(axis="x", **WHOLE)
    axis.grid(visible=False)


def as_typed(text: str) -> str:
    """A name as it was typed: matplotlib sets what stands between two dollars as mathematics."""
    return text.replace("$", r"\$")


def log_numbers(axis: Axis) -> None:
    """0.1 and not a power with an exponent on a log axis that is drawn; 0.2 and 0.5 too up to a SPAN."""
    from matplotlib.ticker import LogLocator

    low, high = sorted(axis.get_view_interval())
    axis.set_minor_locator(LogLocator(subs=(2, 5) if high < SPAN * low else ()))
    axis.set_minor_formatter("{x:g}")
    axis.set_major_formatter("{x:g}")
    axis.set_tick_params(which="both", labelsize=9)


def _away(box: Bbox, points: np.ndarray) -> np.ndarray:
    """From a box to each point."""
    return np.hypot(*(np.clip(points, box.min, box.max) - points).T)


def name_points(axis: Axes, names: Sequence[tuple[str, float, float, str]], size: float = 10) -> None:
    """Write (name, x, y, colour) next to each point, so that no name lies on another one, on a point or outside.

    A name that has no room next to its point is tied to it with a thin line. Call it when all else is drawn: it keeps
    the limits of the axes. In an SVG file each name is a group whose id begins with "name-".
    """
    from matplotlib.transforms import Bbox

    drawing = axis.figure
    drawing.draw_without_rendering()  # the layout decides where points lie
    axis.autoscale(enable=False)
    frame, margin, marker = axis.get_window_extent(), size * drawing.dpi / 288, 4.5 * drawing.dpi / 72
    points = axis.transData.transform([(x, y) for _, x, y, _ in names] or np.zeros((0, 2)))
    taken = [Bbox.from_bounds(x - marker, y - marker, 2 * marker, 2 * marker) for x, y in points]
    for i, ((name, x, y, colour), point) in enumerate(zip(names, points, strict=True)):
        text = axis.text(x, y, as_typed(name), fontsize=size, color=colour, ha="center", va="center", gid=f"name-{i}")
        text.set_in_layout(False)
        half = np.array(text.get_window_extent().padded(margin).size) / 2
        # rings around the point, to the right and up first; further and further away
        spots = [(ring, point + way * (half + marker * (ring + 1.01))) for ring in range(24) for way in _WAYS]
        boxes = [(ring, spot, Bbox([spot - half, spot + half])) for ring, spot in spots]
        inside = [s for s in boxes if frame.x0 <= s[2].x0 and s[2].x1 <= frame.x1 and frame.y0 <= s[2].y0
                  and s[2].y1 <= frame.y1] or boxes  # fmt: skip
        # the first that overlaps nothing and, without a line, has no other point nearer than its own
        ring, spot, box = min(
            inside, key=lambda s: s[2].count_overlaps(taken) + (not s[0] and _away(s[2], points).argmin() != i)
        )
        taken.append(box)
        end = axis.transData.inverted().transform(spot)
        text.set_position(tuple(end))
        if ring:
            axis.plot((x, end[0]), (y, end[1]), color=colour, linewidth=0.6, zorder=1)
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})


def figures(analysis: Analysis, folder: Path) -> list[Path]:
    """Draw all figures as PNG files into an existing folder, from an analysis or its JSON. Returns: the files."""
    paths: list[Path] = []
    for name, draw in (("layer_errors", _layer_errors), ("error_growth", _error_growth), ("bit_sweep", _bit_sweep)):
        data = file_bytes(functools.partial(draw, analysis=analysis), "png")
        paths.append(folder / f"{name}.png")
        write_atomically(paths[-1], lambda file, data=data: file.write(data))
    return paths


def _layer_errors(figure: Figure, analysis: Analysis) -> None:
    layers = analysis["layers"]
    figure.set_figwidth(13)
    left, right = figure.subplots(1, 2, sharey=True)
    layer_map(right, layers)
    layer_map(left, layers, _bits_saved, "bits saved (log2 of the ratio)", "viridis")
    left.set_title("Range of activation over range of residual")
    right.set_title("Error of the output state, same inputs")


def _bits_saved(step: StepErrors) -> float:
    """log2 of the activation's range over the residual's; NaN where nothing was coded."""
    if step["residual_max"] is None or step["residual_min"] is None:
        return float("nan")
    residual = max(abs(step["residual_min"]), abs(step["residual_max"]))
    activation = max(abs(step["activation_min"]), abs(step["activation_max"]))
    return float(np.log2(activation / residual)) if residual and activation else float("nan")


def _error_growth(figure: Figure, analysis: Analysis) -> None:
    growth = analysis["growth"]
    figure.set_size_inches(12.5, 5.4)
    axes = figure.subplots(1, 2, sharey=True)
    shown = [v for mode in ("uncompensated", "compensated") for key in ("error_low", "error", "error_high", "bound")
             for v in growth[mode][key] if v > 0]  # fmt: skip
    if shown:  # still inputs have no errors, and a log scale has no zero
        axes[0].set(yscale="log", ylim=(min(shown) / 2, max(shown) * 8))  # the printed bound may leave the picture
        log_numbers(axes[0].yaxis)
    _growth_panel(axes[0], growth["steps"], growth["uncompensated"], ORANGE, "Without compensation")
    _growth_panel(axes[1], growth["steps"], growth["compensated"], BLUE, "With compensation")
    axes[0].set_ylabel("error of the input state, ||a - â|| / ||a||")
    figure.suptitle("Error growth over the steps against the bounds, medians over the layers")


def _growth_panel(axis: Axes, steps: list[int], spread: dict[str, Any], color: str, title: str) -> None:
    axis.fill_between(steps, spread["error_low"], spread["error_high"], color=color, alpha=0.25, linewidth=0,
                      label="measured, middle half of the layers")  # fmt: skip
    axis.plot(steps, spread["error"], color=color, label="measured, median")
    axis.plot(steps, spread["bound"], color="black", linestyle="--", label="bound (triangle inequality)")
    if min(spread["printed_bound"]) < axis.get_ylim()[1]:
        axis.plot(steps, spread["printed_bound"], color=GREY, linestyle=":", label="as printed in Thm 4.4")
    axis.set(title=title, xlabel="step")
    axis.locator_params(axis="x", **WHOLE)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, fontsize=10)  # below: no curve is under it


def _bit_sweep(figure: Figure, analysis: Analysis) -> None:
    figure.set_size_inches(7, 4.8)
    axis = figure.subplots()
    rows = [row for row in analysis["sweep"] if row["relative_l2"]]
    for mode, (color, marker) in FAMILY_STYLES.items():
        points = sorted((row["bits"], row["relative_l2"]) for row in rows if row["mode"] == mode)
        if points:
            widths, values = zip(*points, strict=True)
            axis.plot(widths, values, color=color, marker=marker, label=mode)
    if rows:
        axis.set_yscale("log")
        log_numbers(axis.yaxis)
        axis.legend()
    bits = sorted(analysis["settings"]["bits"])
    axis.set_xticks(bits)
    axis.set_xlim(max(bits) + 0.3, min(bits) - 0.3)  # from 8 down to 2
    weight = analysis["settings"]["config"]["layer"]["weight"]["bits"]
    axis.set_title(f"Image error by bit width, weights {f'at {weight} bits' if weight else 'in full precision'}")
    axis.set(xlabel="bits of activation or residual", ylabel="relative L2 to the full-precision images")
