"""Table 17's analogue: very few steps."""

from experiments.charts import curves, line_chart
from experiments.experiment import Experiment, Shown, Values, crossed, error, printed_table, times
from experiments.lab import Lab, Row, Run
from modiff import presets

STEPS = (2, 4, 8)
SAMPLERS = ("ddim", "dpmsolver++")
MODES = {"plain": presets.plain, "modulated": presets.published}
BITS = {False: (8, 4), True: (8, 6, 4, 3)}


def measure(lab: Lab) -> Values:
    """Two samplers at 2, 4 and 8 steps, plain and modulated; and 4 bits at the study's steps to compare with."""
    plan = [
        (
            {"place": f"{sampler} {steps}", "sampler": sampler, "config": f"{mode} A{bits}"},
            Run(steps=steps, sampler=sampler, config=make(8, bits)),
        )
        for sampler in SAMPLERS
        for steps in STEPS
        for bits in BITS[lab.settings.full]
        for mode, make in MODES.items()
    ]
    many = [
        ({"config": f"{mode} A4"}, Run(steps=lab.settings.steps, config=make(8, 4))) for mode, make in MODES.items()
    ]
    return {"steps": lab.settings.steps, "rows": lab.rows(plan), "many": lab.rows(many)}


def show(values: Values) -> Shown:
    """The page of `values`: tables and charts, and what they say."""
    rows, caption = values["rows"], "Relative L2 (PSNR), W8, to full precision with as many steps."
    gains = [f"{_gain([row for row in rows if row['place'] == f'ddim {n}'])} ({n} steps)" for n in STEPS]
    return Shown(
        (
            f"At W8A4 modulation lowers the error by a factor of {', '.join(gains)}, against {_gain(values['many'])} "
            f"with {values['steps']} steps. The gain includes the first step, which is not quantized when modulated: "
            f"1/{STEPS[0]} to 1/{STEPS[-1]} of the work.",
            crossed("study-few-steps", caption, rows, down="place", across="config", title="sampler and steps"),
            line_chart(
                "study-table17",
                curves([row for row in rows if row["sampler"] == "ddim"], "config", "steps"),
                title="Few DDIM steps, 8-bit weights",
                x="steps",
                log_x=True,
                caption="The first step runs at full precision when modulated.",
            ),
        ),
        (
            "the printed model is distilled for few steps, this one is not: its images of few steps are poor in full "
            "precision, too, and are compared with those. The printed operations leave the first step out. The larger "
            "the steps, the wider the residual compared with the activation, and the less there is to gain.",
        ),
    )


def _gain(rows: list[Row]) -> str:
    return times(*(error(rows, config=f"{mode} A4") for mode in MODES))


EXPERIMENT = Experiment(
    name="table17",
    also=("few-steps",),
    title="Few steps (table 17's analogue)",
    printed=(
        "SDXL-Turbo, FID, MixDQ -> + MoDiff. No usable result below 8 bits.",
        printed_table(
            "study-printed-table17",
            "Table 17 as printed.",
            "steps|A8|A6|A4",
            (
                "2|46.48 -> 46.30|318.68 -> 193.17|304.77 -> 192.65",
                "4|44.29 -> 44.74|318.57 -> 191.59|325.68 -> 192.74",
                "8|44.61 -> 43.30|347.75 -> 210.38|348.75 -> 212.68",
            ),
        ),
    ),
    measure=measure,
    show=show,
)
