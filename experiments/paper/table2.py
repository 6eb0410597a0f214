"""Table 2: bit widths, with and without modulation."""

from experiments.charts import Line, curves, line_chart
from experiments.experiment import Experiment, Shown, Values, crossed, error, listing, number, printed_table, times
from experiments.lab import Lab, Run
from modiff import presets

BITS = {False: (8, 6, 4, 3, 2), True: (8, 7, 6, 5, 4, 3, 2)}
MODES = {"plain": presets.plain, "modulated": presets.published, "tuned": presets.tuned}


def measure(lab: Lab) -> Values:
    """Plain, modulated and the tuned preset at every width, and 8-bit weights alone."""
    steps = lab.settings.steps
    plan = [({"mode": "weights", "bits": 32}, Run(steps=steps, config=presets.published(8, None)))]
    plan += [
        ({"mode": mode, "bits": bits}, Run(steps=steps, config=make(8, bits)))
        for mode, make in MODES.items()
        for bits in BITS[lab.settings.full]
    ]
    return {"steps": steps, "rows": lab.rows(plan)}


def show(values: Values) -> Shown:
    """The page of `values`: tables and charts, and what they say."""
    rows = [row for row in values["rows"] if row["mode"] in MODES]
    floor = error(values["rows"], mode="weights")
    plain, modulated = (error(rows, mode=mode, bits=4) for mode in ("plain", "modulated"))
    lines = curves(rows, "mode", "bits", colours=(1, 0, 2))
    if floor:
        lines.append(Line(label="W8 alone", level=floor, dashed=True, colour=4))
    return Shown(
        (
            f"With {values['steps']} DDIM steps, 4-bit plain quantization is {number(plain)} off, 4-bit modulated "
            f"{number(modulated)}, {times(plain, modulated)} times less. The 8-bit weights alone are {number(floor)} "
            "off.",
            crossed(
                "study-bits",
                "Relative L2 (PSNR) of the images, W8, by bits of activation or residual.",
                rows,
                down="bits",
                across="mode",
            ),
            listing(
                "study-bits-cost",
                "Bit-operations of one image, all steps, the first at 32-bit activations.",
                [row for row in rows if row["mode"] == "modulated"],
                "bits: d; gbops: .4g = GBOPs",
            ),
            line_chart(
                "study-table2",
                lines,
                title="Image error by bit width, 8-bit weights",
                x="bits of activation or residual",
                falling=True,
                caption="Image error by bit width; the weights' own error is the floor.",
            ),
        ),
        (
            "the printed figures are Frechet distances to data, which cannot fall below those of the model and barely "
            "see small errors; these are paired errors to full precision on the same seeds, which see all. The "
            "columns differ, too: Q-Diff has one static, calibrated scale a layer, LCQ a dynamic scale for each input "
            "channel, which no integer matrix product can run; plain and modulated here have a dynamic scale per "
            "sample (convolutions) or token (linear layers).",
            "In print LCQ + MoDiff is better at 3 bits (12.05) than at 4 (34.02), a typo or an instability. The GBOPs "
            "printed next to these figures are 1254 at every width; bit-operations are proportional to the width.",
        ),
    )


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
