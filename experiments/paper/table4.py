"""Table 4: what modulation does, and what compensation adds."""

from experiments.charts import curves, line_chart
from experiments.experiment import Experiment, Shown, Values, crossed, error, number, printed_table, times
from experiments.lab import Lab, Run
from modiff import presets

BITS = {False: (8, 6, 4), True: (8, 6, 4, 3)}
MODES = {
    "plain": presets.plain,
    "modulation only": presets.uncompensated,
    "modulation + compensation": presets.published,
}
LENGTHS = (1, 2)
"""Multiples of the study's steps: without compensation errors add up over the steps."""


def measure(lab: Lab) -> Values:
    """Three modes at each width with the study's steps, and at 4 bits with twice as many."""
    steps = lab.settings.steps
    plan = [
        ({"mode": mode, "bits": bits}, Run(steps=steps, config=make(8, bits)))
        for bits in BITS[lab.settings.full]
        for mode, make in MODES.items()
    ]
    longer = [
        ({"mode": mode, "length": n * steps}, Run(steps=n * steps, config=make(None, 4)))
        for n in LENGTHS
        if n * steps <= lab.most_steps
        for mode, make in MODES.items()
    ]
    return {"steps": steps, "rows": lab.rows(plan), "longer": lab.rows(longer)}


def show(values: Values) -> Shown:
    """The page of `values`: tables and charts, and what they say."""
    rows, longer, steps = values["rows"], values["longer"], values["steps"]
    caption = f"Relative L2 (PSNR), W8, {steps} DDIM steps."
    longer_caption = "Relative L2 (PSNR), full-precision weights, 4 bits, by steps."
    plain, open_loop, closed = (error(rows, mode=mode, bits=4) for mode in MODES)
    grown = [f"{number(row['relative_l2'])} ({row['length']})" for row in longer if row["mode"] == "modulation only"]
    return Shown(
        (
            f"At W8A4 plain quantization is {number(plain)} off, modulation alone {number(open_loop)}, with "
            f"compensation {number(closed)}. Without it the error grows with the steps: {', '.join(grown)}.",
            crossed("study-ablation", caption, rows, down="bits", across="mode"),
            crossed("study-ablation-steps", longer_caption, longer, down="length", across="mode", title="steps"),
            line_chart(
                "study-table4",
                curves(rows, "mode", "bits", colours=(1, 3, 0)),
                title="Ablation, 8-bit weights",
                x="bits of activation or residual",
                falling=True,
                caption="Plain quantization, quantized differences, and quantized differences with compensation.",
            ),
        ),
        (
            "the printed values are labelled FID at W8A8, W8A6 and W8A4 but equal the sFID entries of the paper's "
            "Table 1 at A6, A4 and A3: column name and row labels are off. In the last printed row modulation alone "
            f"lowers the value by a factor of {times(33.97, 25.42)} and compensation by another {times(25.42, 4.38)}; "
            f"here at W8A4 the factors are {times(plain, open_loop)} and {times(open_loop, closed)}.",
        ),
    )


EXPERIMENT = Experiment(
    name="table4",
    title="Plain, modulation, compensation (table 4)",
    printed=(
        "CIFAR-10, labelled FID.",
        printed_table(
            "study-printed-table4",
            "Table 4 as printed.",
            "|LCQ|modulation only|modulation + compensation",
            ("W8A8|4.61|4.41|4.40", "W8A6|13.07|10.21|4.38", "W8A4|33.97|25.42|4.38"),
        ),
    ),
    measure=measure,
    show=show,
)
