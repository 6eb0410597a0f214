"""The dtype of the states: the law drifts by the rounding of every step."""

from __future__ import annotations

import typing

from experiments.charts import Line, line_chart
from experiments.configs import in_dtype
from experiments.experiment import Experiment, Shown, Values
from experiments.lab import Lab
from experiments.runs import Run
from experiments.tables import crossed
from experiments.words import error, find, number, times
from modiff import presets
from modiff.config import StateDtype

DTYPES: tuple[StateDtype, ...] = tuple(d for d in typing.get_args(StateDtype) if d != "int16")
"""Of the simulation; integer states are kernels', which need integer weights too."""
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
            Run(steps=steps, config=in_dtype(c, dtype)),
        )
        for steps in lengths
        for name, c in configs.items()
        for dtype in DTYPES
    ]
    return {"lengths": lengths, "rows": lab.rows(plan)}


def show(values: Values) -> Shown:
    """Dtypes down, configs and steps across."""
    rows, lengths = values["rows"], values["lengths"]
    table = crossed(
        "study-dtypes",
        "Relative L2 (PSNR), full-precision weights, DDIM.",
        rows,
        down=("dtype", "states"),
        across="config",
    )
    lines = [
        Line(
            label=f"{dtype}, A8",
            x=lengths,
            y=[error(find(rows, dtype=dtype, name="modulated A8", steps=n)) for n in lengths],
        )
        for dtype in DTYPES
    ]
    figure = line_chart(
        "study-state-dtype",
        lines,
        title="Dtype of the states, 8-bit residuals",
        x="steps",
        y="relative L2 to full precision",
        caption="States in 16 bits lose at every step what they cannot hold.",
    )
    last = lengths[-1]
    at = {d: error(find(rows, dtype=d, name="modulated A8", steps=last)) for d in DTYPES}
    return Shown(
        (
            f"With 8-bit residuals and {last} steps: "
            + ", ".join(f"{dtype} {number(value)}" for dtype, value in at.items())
            + f". The error of bfloat16 is {times(at['bfloat16'], at['float32'])} times that of float32, of float16 "
            f"{times(at['float16'], at['float32'])} times. What 16-bit states lose at each step was sent to the "
            "output state already, so the two sides drift apart.",
            table,
            figure,
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
