"""Table 2: bit widths, with and without modulation."""

from __future__ import annotations

import itertools

from experiments.charts import Line, line_chart
from experiments.experiment import Experiment, Shown, Values, printed_table
from experiments.lab import Lab
from experiments.runs import Run
from experiments.tables import crossed, listing
from experiments.words import error, find, less, number
from modiff import presets

BITS = {False: (8, 6, 4, 3, 2), True: (8, 7, 6, 5, 4, 3, 2)}
MODES = {"plain": presets.plain, "modulated": presets.published, "tuned": presets.tuned}
WEIGHT_BITS = 8


def measure(lab: Lab) -> Values:
    """Plain, modulated and the tuned preset at every width, and 8-bit weights alone."""
    plan = [
        ({"mode": "weights", "bits": 32}, Run(steps=lab.settings.steps, config=presets.published(WEIGHT_BITS, None)))
    ]
    plan += [
        ({"mode": mode, "bits": bits}, Run(steps=lab.settings.steps, config=make(WEIGHT_BITS, bits)))
        for mode, make in MODES.items()
        for bits in BITS[lab.settings.full]
    ]
    return {"steps": lab.settings.steps, "rows": lab.rows(plan)}


def show(values: Values) -> Shown:
    """Widths down, modes across."""
    rows = [row for row in values["rows"] if row["mode"] in MODES]
    floor = error(find(values["rows"], mode="weights"))
    table = crossed(
        "study-bits",
        f"Relative L2 (PSNR) of the images, W{WEIGHT_BITS}, by bits of activation or residual.",
        rows,
        down=("bits", "bits"),
        across="mode",
    )
    cost = [row for row in rows if row["mode"] == "modulated"]
    costs = listing(
        "study-bits-cost",
        "Bit-operations of one image, all steps, the first at 32-bit activations.",
        cost,
        [("bits", "bits", "d"), ("gbops", "GBOPs", ".4g")],
    )
    lines = [
        Line(
            label=mode,
            x=[r["bits"] for r in rows if r["mode"] == mode],
            y=[error(r) for r in rows if r["mode"] == mode],
            colour=c,
        )
        for mode, c in zip(MODES, (1, 0, 2), strict=True)
    ]
    if floor:
        lines.append(Line(label=f"W{WEIGHT_BITS} alone", level=floor, dashed=True, colour=4))
    figure = line_chart(
        "study-table2",
        lines,
        title=f"Image error by bit width, {WEIGHT_BITS}-bit weights",
        x="bits of activation or residual",
        y="relative L2 to full precision",
        falling=True,
        caption="Image error by bit width; the weights' own error is the floor.",
    )
    plain, modulated = (error(find(rows, mode=m, bits=4)) for m in ("plain", "modulated"))
    falls = _monotone([error(row) for row in rows if row["mode"] == "modulated"])
    return Shown(
        (
            f"With {values['steps']} DDIM steps, 4-bit plain quantization is {number(plain)} off, 4-bit modulated "
            f"{number(modulated)}: {less(modulated, plain)}. The 8-bit weights alone are {number(floor)} off.",
            table,
            costs,
            figure,
        ),
        (
            "the printed figures are Frechet distances to data, which cannot fall below those of the model and barely "
            "see small errors; these are paired errors to full precision on the same seeds, which see all. The "
            "columns differ, too: Q-Diff has one static, calibrated scale a layer, LCQ a dynamic scale for each input "
            "channel, which no integer matrix product can run; plain and modulated here have a dynamic scale per "
            "sample (convolutions) or token (linear layers).",
            "In print LCQ + MoDiff is better at 3 bits (12.05) than at 4 (34.02), a typo or an instability: here the "
            f"modulated error {'rises with every bit that is taken away' if falls else 'is not monotone either'}. The "
            "GBOPs printed beside these figures are 1254 at every width; bit-operations are proportional to the "
            "width.",
        ),
    )


def _monotone(errors: list[float | None]) -> bool:
    """Whether errors rise from row to row; a diverged run counts as the largest."""
    known = [float("inf") if e is None else e for e in errors]
    return all(a <= b for a, b in itertools.pairwise(known))


EXPERIMENT = Experiment(
    name="table2",
    title="Bit sweep (table 2)",
    printed=(
        "LSUN-Church, 8-bit weights, FID / sFID; with full-precision activations 4.03 / 10.89.",
        printed_table(
            "study-printed-table2",
            "Table 2 as printed, FID / sFID.",
            "|Q-Diff|Q-Diff + MoDiff|LCQ|LCQ + MoDiff",
            (
                "A8|4.24 / 10.57|3.85 / 10.82|4.02 / 11.53|3.99 / 10.06",
                "A6|55.13 / 30.98|5.43 / 13.41|4.50 / 12.90|3.89 / 10.12",
                "A4|355.85 / 187.56|3.97 / 11.16|198.37 / 161.03|34.02 / 10.59",
                "A3|367.51 / 354.59|5.40 / 13.81|341.62 / 407.68|12.05 / 35.29",
            ),
        ),
    ),
    measure=measure,
    show=show,
)
