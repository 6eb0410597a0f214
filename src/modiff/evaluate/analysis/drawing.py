"""What all figures share: colours, a style, the bytes of a file, and maps of layers by steps."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from modiff.evaluate.analysis.layers import LayerTrace, StepErrors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours: apart also for the colour-blind.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#666666"
FAMILY_STYLES = {"plain": (RED, "s"), "uncompensated": (ORANGE, "^"), "modulated": (BLUE, "o"), "tuned": (GREEN, "D")}
"""Colour and marker of each family of presets."""
STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "svg.hashsalt": "modiff",
}
MOST_NAMES = 80
"""Layer names that fit next to a map; above that, every second or third layer is named."""


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


def layer_map(axis: Axes, layers: Sequence[LayerTrace], value: Callable[[StepErrors], float], label: str,
              colours: str) -> None:  # fmt: skip
    """A map of a value of every layer and step, layers down and steps across; NaN stays empty."""
    table = np.full((len(layers), 1 + max(step["step"] for layer in layers for step in layer["steps"])), np.nan)
    for row, layer in zip(table, layers, strict=True):
        for step in layer["steps"]:
            row[step["step"]] = value(step)
    shown = axis.imshow(table, aspect="auto", interpolation="nearest", cmap=colours)
    axis.figure.colorbar(shown, ax=axis, label=label)
    names = [layer["name"] + (f" (call {layer['call'] + 1})" if layer["call"] else "") for layer in layers]
    every = -(-len(names) // MOST_NAMES)
    axis.set_yticks(range(0, len(names), every), [as_typed(name) for name in names[::every]], fontsize=8)
    axis.set_xlabel("step (0 = first, anchored)")
    axis.grid(visible=False)


def map_height(layers: Sequence[LayerTrace]) -> float:
    """Inches that a map of these layers needs."""
    return max(3.0, 0.19 * min(len(layers), MOST_NAMES) + 1.2)


def log_error(step: StepErrors) -> float:
    """log10 of a layer's output error; NaN below float32's own rounding."""
    error = step["output_relative_l2"]
    return float(np.log10(error)) if error > 1e-7 else float("nan")


def as_typed(text: str) -> str:
    """A name as it was typed: matplotlib sets what stands between two dollars as mathematics."""
    return text.replace("$", r"\$")
