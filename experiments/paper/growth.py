"""Theorem 4.4: how errors grow over many steps, against bounds."""

from __future__ import annotations

from typing import Any

import numpy as np

from experiments.charts import Line, line_chart
from experiments.experiment import Experiment, Shown, Values
from experiments.lab import Lab
from experiments.tables import listing
from modiff import presets
from modiff.evaluate.analysis.growth import ErrorGrowth, Growth, Spread
from modiff.evaluate.report.document import Table

STEPS = {False: 100, True: 200}
BITS = {False: (4,), True: (8, 4, 3, 2)}
LOOPS = ("uncompensated", "compensated")


def measure(lab: Lab) -> Values:
    """Both loops beside one full-precision trajectory, for each bit width."""
    steps = min(STEPS[lab.settings.full], lab.most_steps)
    found: list[dict[str, Any]] = []
    for bits in BITS[lab.settings.full]:
        watcher = ErrorGrowth()
        lab.watch(presets.published(None, bits), [watcher], steps)
        growth = watcher.growth()
        found.append(
            {
                "bits": bits,
                **{loop: dict(growth[loop]) for loop in LOOPS},
                "steps": growth["steps"],
                **_contraction(growth),
            }
        )
    return {"steps": steps, "growth": found}


def _contraction(growth: Growth) -> dict[str, Any]:
    """Quartiles of the measured c over the layers, and where Thm 4.3 promises none under 1."""
    measured = np.array([layer["c"] for layer in growth["layers"]])
    promised = np.array([layer["c_theorem"] for layer in growth["layers"]])
    low, middle, high = np.quantile(measured, (0.25, 0.5, 0.75))
    return {
        "c_low": float(low),
        "c": float(middle),
        "c_high": float(high),
        "c_worst": float(measured.max()),
        "unpromised": float((promised >= 1).mean()),
    }


def show(values: Values) -> Shown:
    """Error and bounds at a few steps, and both loops as figures."""
    first = next(found for found in values["growth"] if found["bits"] == 4)
    figures = [_chart(first, loop, colour) for loop, colour in zip(LOOPS, (3, 0), strict=True)]
    tables = _steps(values["growth"]), _bounds(values["growth"])
    return Shown((_sentence(first), *tables, *figures), (WHY,))


def _steps(growth: list[dict[str, Any]]) -> Table:
    """Error and bounds at a few steps."""
    rows: list[dict[str, Any]] = []
    for found in growth:
        for loop in LOOPS:
            for step in _marks(found["steps"]):
                i = found["steps"].index(step)
                spread = found[loop]
                rows.append(
                    {
                        "bits": found["bits"],
                        "loop": loop,
                        "step": step,
                        "error": spread["error"][i],
                        "bound": spread["bound"][i],
                        "printed": spread["printed_bound"][i],
                    }
                )
    return listing(
        "study-growth-steps",
        "||a - â|| / ||a||, medians over the layers.",
        rows,
        [
            ("bits", "bits", "d"),
            ("loop", "loop", ""),
            ("step", "step", "d"),
            ("error", "measured", ".3g"),
            ("bound", "corrected bound", ".3g"),
            ("printed", "bound as printed", ".3g"),
        ],
    )


def _bounds(growth: list[dict[str, Any]]) -> Table:
    """How often bounds were exceeded, and what the quantizer loses."""
    shares = [
        {
            "bits": f["bits"],
            "loop": loop,
            "exceeded": f"{f[loop]['exceeded']:.2%}",
            "printed": f"{f[loop]['printed_exceeded']:.1%}",
            "c": f["c"],
            "c_worst": f["c_worst"],
            "unpromised": f"{f['unpromised']:.0%}",
        }
        for f in growth
        for loop in LOOPS
    ]
    return listing(
        "study-growth-bounds",
        "How often the error lies above a bound, over all layers and steps; c is the largest share of a residual's "
        "energy that the quantizer lost in a layer.",
        shares,
        [
            ("bits", "bits", "d"),
            ("loop", "loop", ""),
            ("exceeded", "above the corrected bound", ""),
            ("printed", "above the printed bound", ""),
            ("c", "c, median layer", ".3g"),
            ("c_worst", "c, worst layer", ".3g"),
            ("unpromised", "layers where Thm 4.3 gives c >= 1", ""),
        ],
    )


WHY = (
    "the printed exponents run the wrong way: the proof's own recursion gives the newest step the largest weight with "
    "compensation and the smallest without. Its exponential growth without compensation comes from (a + b)^2 <= 2a^2 "
    "+ 2b^2; with the triangle inequality the bound is sqrt(c) times the sum of all moves, at most linear. With "
    "compensation it is the sum of c^(n/2) times the move n - 1 steps ago, and needs c < 1 only, not c < 1/2. Thm "
    "4.3's bound on c counts a full quantization step in every element, so at few bits it promises nothing where the "
    "quantizer contracts well."
)


def _sentence(found: dict[str, Any]) -> str:
    marks = _marks(found["steps"])
    at = {loop: [found[loop]["error"][found["steps"].index(m)] for m in (marks[0], marks[-1])] for loop in LOOPS}
    opened, closed = at["uncompensated"], at["compensated"]
    return (
        f"At {found['bits']} bits over {len(found['steps']) + 1} DDIM steps, the median layer's input state is off by "
        f"{opened[0]:.3g} at step {marks[0]} and {opened[1]:.3g} at step {marks[-1]} without compensation, by "
        f"{closed[0]:.3g} and {closed[1]:.3g} with it. The corrected bounds were exceeded in "
        f"{found['uncompensated']['exceeded']:.2%} and {found['compensated']['exceeded']:.2%} of all layers and "
        f"steps, the printed ones in {found['uncompensated']['printed_exceeded']:.1%} and "
        f"{found['compensated']['printed_exceeded']:.1%}. The layers keep their inputs of full precision here."
    )


def _marks(steps: list[int]) -> list[int]:
    """The steps that a table shows."""
    return [s for s in (1, 3, 10, 30, 99, 199) if s in steps] if len(steps) > 1 else steps


def _chart(found: dict[str, Any], loop: str, colour: int) -> Any:
    spread: Spread = found[loop]
    steps = found["steps"]
    lines = [
        Line(
            label="measured, median and middle half",
            x=steps,
            y=spread["error"],
            marked=False,
            colour=colour,
            band=(spread["error_low"], spread["error_high"]),
        ),
        Line(label="corrected bound", x=steps, y=spread["bound"], marked=False, dashed=True, colour=7),
        Line(
            label="as printed in Thm 4.4",
            x=steps,
            y=[min(v, 100 * max(spread["bound"])) for v in spread["printed_bound"]],
            marked=False,
            dashed=True,
            colour=4,
        ),
    ]
    return line_chart(
        f"study-growth-{loop}",
        lines,
        title=f"{loop.capitalize()}, {found['bits']} bits",
        x="step",
        y="||a - â|| / ||a||",
        half=True,
        caption=f"Error of the input state, {loop}; the printed bound is cut at 100 times the corrected "
        "one's largest value.",
    )


EXPERIMENT = Experiment(
    name="growth",
    also=("theorem44",),
    title="Error growth against the bounds (theorem 4.4)",
    printed=(
        "bounds without and with compensation (theorem 4.4) that need an exact first step and a quantizer that "
        "loses at "
        "most a share c < 1/2 of what it is given. No measurement over the steps.",
    ),
    measure=measure,
    show=show,
)
