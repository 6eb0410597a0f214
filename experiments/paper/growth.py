"""Theorem 4.4: how errors grow over many steps, against bounds."""

from typing import Any

import numpy as np

from experiments.charts import Line, line_chart
from experiments.experiment import Experiment, Shown, Values, listing
from experiments.lab import Lab
from modiff import presets
from modiff.evaluate.analysis.growth import ErrorGrowth, Growth
from modiff.evaluate.report.document import Figure, Table

STEPS = {False: 100, True: 200}
BITS = {False: (4,), True: (8, 4, 3, 2)}
LOOPS = ("uncompensated", "compensated")
SHOWN_STEPS = (1, 3, 10, 30, 99, 199)


def measure(lab: Lab) -> Values:
    """Both loops next to one full-precision trajectory, for each bit width."""
    steps = min(STEPS[lab.settings.full], lab.most_steps)
    growths: list[dict[str, Any]] = []
    for bits in BITS[lab.settings.full]:
        watcher = ErrorGrowth()
        lab.watch(presets.published(None, bits), [watcher], steps)
        growth = watcher.growth()
        loops = {loop: dict(growth[loop]) for loop in LOOPS}
        growths.append({"bits": bits, **loops, "steps": growth["steps"], **_contraction(growth)})
    return {"steps": steps, "growth": growths}


def _contraction(growth: Growth) -> dict[str, Any]:
    """Quartiles of the measured c over the layers, and where Thm 4.3 promises none under 1."""
    measured = np.array([layer["c"] for layer in growth["layers"]])
    promised = np.array([layer["c_theorem"] for layer in growth["layers"]])
    quartiles = {key: float(np.quantile(measured, q)) for key, q in (("c_low", 0.25), ("c", 0.5), ("c_high", 0.75))}
    return {**quartiles, "c_worst": float(measured.max()), "unpromised": float((promised >= 1).mean())}


def show(values: Values) -> Shown:
    """The page of `values`: tables and charts, and what they say."""
    growths = values["growth"]
    four = next(growth for growth in growths if growth["bits"] == 4)
    figures = [_chart(four, loop, colour) for loop, colour in zip(LOOPS, (3, 0), strict=True)]
    sentence = (
        f"{len(four['steps']) + 1} DDIM steps; the layers keep their inputs of full precision. At 4 bits the corrected "
        f"bounds were exceeded in {four['uncompensated']['exceeded']:.2%} of all layers and steps without "
        f"compensation and in {four['compensated']['exceeded']:.2%} with it, the printed ones in "
        f"{four['uncompensated']['printed_exceeded']:.1%} and {four['compensated']['printed_exceeded']:.1%}."
    )
    return Shown((sentence, _steps(growths), _bounds(growths), *figures), (WHY,))


def _steps(growths: list[dict[str, Any]]) -> Table:
    """Error and bounds at a few steps."""
    keys = ("error", "bound", "printed_bound")
    rows = [
        {"bits": growth["bits"], "loop": loop, "step": step, **{key: growth[loop][key][i] for key in keys}}
        for growth in growths
        for loop in LOOPS
        for i, step in enumerate(growth["steps"])
        if step in SHOWN_STEPS or len(growth["steps"]) == 1
    ]
    columns = (
        "bits: d; loop; step: d; error: .3g = measured; bound: .3g = corrected bound; "
        "printed_bound: .3g = bound as printed"
    )
    return listing("study-growth-steps", "||a - â|| / ||a||, medians over the layers.", rows, columns)


def _bounds(growths: list[dict[str, Any]]) -> Table:
    """How often bounds were exceeded, and what the quantizer loses."""
    rows = [
        {
            **growth,
            "loop": loop,
            "exceeded": f"{growth[loop]['exceeded']:.2%}",
            "printed": f"{growth[loop]['printed_exceeded']:.1%}",
            "unpromised": f"{growth['unpromised']:.0%}",
        }
        for growth in growths
        for loop in LOOPS
    ]
    return listing(
        "study-growth-bounds",
        "How often the error lies above a bound, over all layers and steps; c is the largest share of a residual's "
        "energy that the quantizer lost in a layer.",
        rows,
        "bits: d; loop; exceeded = above the corrected bound; printed = above the printed bound; "
        "c: .3g = c, median layer; c_worst: .3g = c, worst layer; unpromised = layers where Thm 4.3 gives c >= 1",
    )


def _chart(growth: dict[str, Any], loop: str, colour: int) -> Figure:
    spread, steps = growth[loop], growth["steps"]
    highest = 100 * max(spread["bound"])
    printed = [min(value, highest) for value in spread["printed_bound"]]
    band = spread["error_low"], spread["error_high"]
    label = "measured, median and middle half"
    lines = [
        Line(label=label, x=steps, y=spread["error"], marked=False, colour=colour, band=band),
        Line(label="corrected bound", x=steps, y=spread["bound"], marked=False, dashed=True, colour=7),
        Line(label="as printed in Thm 4.4", x=steps, y=printed, marked=False, dashed=True, colour=4),
    ]
    return line_chart(
        f"study-growth-{loop}",
        lines,
        title=f"{loop.capitalize()}, {growth['bits']} bits",
        x="step",
        y="||a - â|| / ||a||",
        half=True,
        caption=f"Error of the input state, {loop}; the printed bound is cut at 100 times the corrected one's largest "
        "value.",
    )


WHY = (
    "the printed exponents run the wrong way: the proof's own recursion gives the newest step the largest weight with "
    "compensation and the smallest without. Its exponential growth without compensation comes from (a + b)^2 <= 2a^2 "
    "+ 2b^2; with the triangle inequality the bound is sqrt(c) times the sum of all moves, at most linear. With "
    "compensation it is the sum of c^(n/2) times the move n - 1 steps ago, and needs c < 1 only, not c < 1/2. Thm "
    "4.3's bound on c counts a full quantization step in every element, so at few bits it promises nothing where the "
    "quantizer contracts well."
)


EXPERIMENT = Experiment(
    name="growth",
    also=("theorem44",),
    title="Error growth against the bounds (theorem 4.4)",
    printed=(
        "bounds without and with compensation (theorem 4.4) that need an exact first step and a quantizer that "
        "loses at most a share c < 1/2 of what it is given. No measurement over the steps.",
    ),
    measure=measure,
    show=show,
)
