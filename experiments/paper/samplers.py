"""Tables 5, 15 and 16: other samplers, and fewer steps."""

from __future__ import annotations

from experiments.charts import Line, line_chart
from experiments.experiment import Experiment, Shown, Values, printed_table
from experiments.lab import Lab
from experiments.runs import Run
from experiments.tables import crossed
from experiments.words import error, find, number, times
from modiff import presets

SAMPLERS = ("ddim", "ddpm", "dpmsolver++", "pndm")
STEPS = (100, 50, 20, 10)
CONFIGS = {
    False: {
        "plain A4": presets.plain(8, 4),
        "modulated A4": presets.published(8, 4),
        "modulated A3": presets.published(8, 3),
    },
    True: {
        **{f"plain A{b}": presets.plain(8, b) for b in (8, 6, 4)},
        **{f"modulated A{b}": presets.published(8, b) for b in (8, 6, 4, 3)},
        "tuned A4": presets.tuned(8, 4),
    },
}
HEADLINE = "modulated A4"


def measure(lab: Lab) -> Values:
    """Every sampler and number of steps, each against its own full precision."""
    plan = [
        (
            {"place": f"{sampler} {steps}", "sampler": sampler, "config": name},
            Run(steps=steps, sampler=sampler, config=config),
        )
        for sampler in SAMPLERS
        for steps in STEPS
        if steps <= lab.most_steps
        for name, config in CONFIGS[lab.settings.full].items()
    ]
    return {"rows": lab.rows(plan)}


def show(values: Values) -> Shown:
    """Samplers and steps down, configs across."""
    rows = values["rows"]
    table = crossed(
        "study-samplers-steps",
        "Relative L2 (PSNR), W8, to full precision with the same sampler and steps.",
        rows,
        down=("place", "sampler and steps"),
        across="config",
    )
    lines = [
        Line(
            label=s,
            x=[r["steps"] for r in rows if r["sampler"] == s and r["config"] == HEADLINE],
            y=[error(r) for r in rows if r["sampler"] == s and r["config"] == HEADLINE],
        )
        for s in SAMPLERS
    ]
    figure = line_chart(
        "study-samplers",
        lines,
        title="Modulated W8A4 by sampler and steps",
        x="steps",
        y="relative L2 to full precision",
        log_x=True,
        falling=True,
        caption="Each sampler against its own full precision with as many steps.",
    )
    most = max(row["steps"] for row in rows)
    at = {s: error(find(rows, sampler=s, config=HEADLINE, steps=most)) for s in SAMPLERS}
    few = {s: error(find(rows, sampler=s, config=HEADLINE, steps=min(STEPS))) for s in SAMPLERS}
    return Shown(
        (
            f"Modulated W8A4 with {most} steps is off by "
            + ", ".join(f"{number(value)} ({s})" for s, value in at.items())
            + f"; with {min(STEPS)} steps by "
            + ", ".join(f"{number(value)} ({s})" for s, value in few.items())
            + f". With {most} steps the stochastic DDPM, whose fresh noise moves the input at every step, has "
            f"{times(at['ddpm'], at['ddim'])} times the error of DDIM.",
            table,
            figure,
        ),
        (
            "the printed figures are Frechet distances of other models, to data; theirs hides what full precision "
            "with 20 steps has lost already, since both columns have lost it. These compare with full precision of "
            "the same sampler and steps, noise included, so they show the quantization alone. PNDM evaluates its "
            "second step twice, at the same time: the recursion codes that evaluation as one more step.",
        ),
    )


EXPERIMENT = Experiment(
    name="samplers",
    also=("table5", "table15", "table16"),
    title="Samplers and steps (tables 5, 15 and 16)",
    printed=(
        "DDPM on LSUN-Bedrooms (table 5, LCQ, FID / sFID), DPM-Solver-2 and DDIM with 20 steps on CIFAR-10 (tables 15 "
        "and 16, LTQ, FID).",
        printed_table(
            "study-printed-samplers",
            "Tables 5, 15 and 16 as printed: without MoDiff -> with MoDiff.",
            "|DDPM, Bedrooms|DPM-Solver-2, 20 steps|DDIM, 20 steps",
            (
                "A8|3.61 / 8.65 -> 3.39 / 8.02|3.92 -> 3.91|6.93 -> 6.90",
                "A6|50.17 / 52.18 -> 12.60 / 13.71|10.82 -> 3.91|20.28 -> 6.75",
                "A4|102.16 / 104.18 -> 34.25 / 30.12|299.72 -> 26.54|297.21 -> 22.12",
            ),
        ),
    ),
    measure=measure,
    show=show,
)
