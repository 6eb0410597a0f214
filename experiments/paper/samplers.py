"""Tables 5, 15 and 16: other samplers, and fewer steps."""

from collections.abc import Mapping, Sequence

from experiments.charts import curves, line_chart
from experiments.experiment import Experiment, Shown, Values, crossed, error, number, printed_table
from experiments.lab import Lab, Row
from experiments.runs import PARALLEL, Run
from modiff import ModiffConfig, presets

SAMPLERS = ("ddim", "ddpm", "ddm", "dpmsolver++", "pndm")
IN_PARALLEL = tuple(PARALLEL + name for name in ("ddim", "ddpm", "dpmsolver++"))
STEPS = (100, 50, 20, 10)
MODULATED = "modulated A4"
CONFIGS = {
    False: {
        "plain A4": presets.plain(8, 4),
        MODULATED: presets.published(8, 4),
        "modulated A3": presets.published(8, 3),
    },
    True: {
        **{f"plain A{b}": presets.plain(8, b) for b in (8, 6, 4)},
        **{f"modulated A{b}": presets.published(8, b) for b in (8, 6, 4, 3)},
        "tuned A4": presets.tuned(8, 4),
    },
}


def measure(lab: Lab) -> Values:
    """Every sampler and number of steps against its own full precision, in parallel too."""

    def rows(samplers: Sequence[str], configs: Mapping[str, ModiffConfig | None]) -> list[Row]:
        plan = [
            (
                {"place": f"{sampler} {steps}", "sampler": sampler, "config": name},
                Run(steps=steps, sampler=sampler, config=config),
            )
            for sampler in samplers
            for steps in STEPS
            if steps <= lab.most_steps
            for name, config in configs.items()
        ]
        return lab.rows(plan)

    configs = CONFIGS[lab.settings.full]
    parallel = {"full precision": None, MODULATED: configs[MODULATED]}
    return {"rows": rows(SAMPLERS, configs), "parallel": rows(IN_PARALLEL, parallel)}


def show(values: Values) -> Shown:
    """The page of `values`: tables and charts, and what they say."""
    rows, parallel = values["rows"], values["parallel"]
    caption = "Relative L2 (PSNR), W8, to full precision with the same sampler and steps."
    most, least = (
        ", ".join(f"{number(error(rows, sampler=s, config=MODULATED, steps=n))} ({s})" for s in SAMPLERS)
        for n in (max(row["steps"] for row in rows), min(STEPS))
    )
    return Shown(
        (
            f"Modulated W8A4 with {max(row['steps'] for row in rows)} steps is off by {most}; with {min(STEPS)} steps "
            f"by {least}. The fresh noise of the stochastic DDPM moves the input at every step.",
            crossed("study-samplers-steps", caption, rows, down="place", across="config", title="sampler and steps"),
            line_chart(
                "study-samplers",
                curves([row for row in rows if row["config"] == MODULATED], "sampler", "steps"),
                title="Modulated W8A4 by sampler and steps",
                x="steps",
                log_x=True,
                falling=True,
                caption="Each sampler against its own full precision with as many steps.",
            ),
            "In parallel (docs/parallel.md), window 10, tolerance 0.1: full precision shows what the tolerance loses.",
            crossed("study-samplers-parallel", caption, parallel, down="place", across="config", title="in parallel"),
            "Evaluations of each image in full precision: "
            + ", ".join(f"{r['evaluations']} ({r['place']})" for r in parallel if r["config"] == "full precision")
            + ".",
        ),
        (
            "the printed figures are Frechet distances of other models, to data; theirs hides what full precision "
            "with 20 steps has lost already, since both columns have lost it. These compare with full precision of "
            "the same sampler and steps, noise included, so they show the quantization alone. PNDM evaluates its "
            "second step twice, at the same time: the recursion treats that evaluation as one more step.",
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
