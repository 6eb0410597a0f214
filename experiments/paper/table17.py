"""Table 17's analogue: very few steps."""

from __future__ import annotations

from experiments.charts import Line, line_chart
from experiments.experiment import Experiment, Shown, Values, printed_table
from experiments.lab import Lab
from experiments.runs import Run
from experiments.tables import crossed
from experiments.words import between, error, find, times
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
    """Samplers and steps down, configs across."""
    rows, many = values["rows"], values["many"]
    table = crossed(
        "study-few-steps",
        "Relative L2 (PSNR), W8, to full precision with as many steps.",
        rows,
        down=("place", "sampler and steps"),
        across="config",
    )
    names = list(dict.fromkeys(row["config"] for row in rows))
    lines = [
        Line(
            label=name,
            x=[r["steps"] for r in rows if r["config"] == name and r["sampler"] == "ddim"],
            y=[error(r) for r in rows if r["config"] == name and r["sampler"] == "ddim"],
        )
        for name in names
    ]
    figure = line_chart(
        "study-table17",
        lines,
        title="Few DDIM steps, 8-bit weights",
        x="steps",
        y="relative L2 to full precision",
        log_x=True,
        caption="The first step runs at full precision when modulated.",
    )
    plain, modulated = ([error(find(rows, place=f"ddim {n}", config=f"{m} A4")) for n in STEPS] for m in MODES)
    gains = ", ".join(f"{times(p, m)} ({n} steps)" for n, p, m in zip(STEPS, plain, modulated, strict=True))
    whole = times(*(error(find(many, config=f"{mode} A4")) for mode in MODES))
    return Shown(
        (
            f"Modulated W8A4 is off by {between(modulated)} with {STEPS[0]} to {STEPS[-1]} DDIM steps, plain by "
            f"{between(plain)}: the gain is a factor of {gains}, against {whole} with {values['steps']} steps. The "
            f"gain holds the first step, which is not quantized when modulated: 1/{STEPS[0]} to 1/{STEPS[-1]} of the "
            "work.",
            table,
            figure,
        ),
        (
            "the printed model is distilled for few steps, this one is not: its images of few steps are poor in full "
            "precision, too, and are compared with those. The printed operations leave the first step out. The larger "
            "the steps, the wider the residual beside the activation, and the less there is to gain.",
        ),
    )


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
