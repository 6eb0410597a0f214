"""The dtype of the states: the law drifts by the rounding of every step."""

import typing

from experiments.charts import curves, line_chart
from experiments.experiment import Experiment, Shown, Values, crossed, error, number
from experiments.lab import Lab
from experiments.runs import Run, in_dtype
from modiff import presets
from modiff.config import StateDtype

DTYPES: tuple[StateDtype, ...] = tuple(d for d in typing.get_args(StateDtype) if d not in ("auto", "int16"))
"""Those of simulation; integer states belong to integer execution, which needs integer weights too."""
LENGTHS = {False: (1, 2), True: (1, 2, 4)}
CONFIGS = {"modulated A8": presets.published(None, 8), "modulated A4": presets.published(None, 4)}
TUNED = {"tuned A4": presets.tuned(None, 4)}


def measure(lab: Lab) -> Values:
    """Every dtype at the study's steps and at multiples of them."""
    lengths = [n * lab.settings.steps for n in LENGTHS[lab.settings.full] if n * lab.settings.steps <= lab.most_steps]
    configs = CONFIGS | (TUNED if lab.settings.full else {})
    plan = [
        (
            {"dtype": dtype, "config": f"{name}, {steps} steps", "name": name},
            Run(steps=steps, config=in_dtype(config, dtype)),
        )
        for steps in lengths
        for name, config in configs.items()
        for dtype in DTYPES
    ]
    return {"lengths": lengths, "rows": lab.rows(plan)}


def show(values: Values) -> Shown:
    """The page of `values`: tables and charts, and what they say."""
    rows, last = values["rows"], values["lengths"][-1]
    eight = [{**row, "dtype": f"{row['dtype']}, A8"} for row in rows if row["name"] == "modulated A8"]
    caption = "Relative L2 (PSNR), full-precision weights, DDIM."
    at = [f"{dtype} {number(error(rows, dtype=dtype, name='modulated A8', steps=last))}" for dtype in DTYPES]
    return Shown(
        (
            f"With 8-bit residuals and {last} steps: {', '.join(at)}. What 16-bit states lose at each step was sent to "
            "the output state already, so the two states drift apart.",
            crossed("study-dtypes", caption, rows, down="dtype", across="config", title="states"),
            line_chart(
                "study-state-dtype",
                curves(eight, "dtype", "steps"),
                title="Dtype of the states, 8-bit residuals",
                x="steps",
                caption="States in 16 bits lose at every step what they cannot hold.",
            ),
        ),
        ("the paper does not say what its states are stored in; its memory table counts them at 2 to 8 bits.",),
    )


EXPERIMENT = Experiment(
    name="state-dtype",
    title="Dtype of the states",
    printed=("nothing on the dtype of the states.",),
    measure=measure,
    show=show,
)
