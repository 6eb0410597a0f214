"""What shares a scale: the tensor, a sample, a token, an input channel."""

from __future__ import annotations

from experiments.charts import Line, line_chart
from experiments.configs import coded
from experiments.experiment import Experiment, Shown, Values, printed_table
from experiments.lab import Lab
from experiments.runs import Run
from experiments.tables import crossed
from experiments.words import error, find, less, number
from modiff import presets

GRANULARITIES = ("tensor", "sample", "auto", "token", "input_channel")
TITLES = {
    "tensor": "tensor",
    "sample": "sample",
    "auto": "auto: sample, token in linear layers",
    "token": "token, also in convolutions (study only)",
    "input_channel": "input channel (study only)",
}
BITS = {False: (4,), True: (8, 6, 4, 3)}
MODES = {"plain": presets.plain, "modulated": presets.published}


def measure(lab: Lab) -> Values:
    """Both modes at every granularity and width."""
    plan = [
        (
            {"granularity": TITLES[g], "config": f"{mode} A{bits}", "bits": bits, "mode": mode},
            Run(steps=lab.settings.steps, config=coded(make(None, bits), granularity=g)),
        )
        for bits in BITS[lab.settings.full]
        for mode, make in MODES.items()
        for g in GRANULARITIES
    ]
    return {"steps": lab.settings.steps, "rows": lab.rows(plan)}


def show(values: Values) -> Shown:
    """Granularities down, configs across."""
    rows = values["rows"]
    table = crossed(
        "study-granularities",
        f"Relative L2 (PSNR), full-precision weights, {values['steps']} DDIM steps.",
        rows,
        down=("granularity", "a scale for each"),
        across="config",
    )
    order = {TITLES[g]: i for i, g in enumerate(GRANULARITIES)}
    names = list(dict.fromkeys(row["config"] for row in rows))
    lines = [
        Line(
            label=name,
            x=[order[r["granularity"]] for r in rows if r["config"] == name],
            y=[error(r) for r in rows if r["config"] == name],
        )
        for name in names
    ]
    figure = line_chart(
        "study-granularity",
        lines,
        title="Granularity",
        x="0 tensor, 1 sample, 2 auto, 3 token, 4 input channel",
        y="relative L2 to full precision",
        caption="Coarse to fine; 3 (in convolutions) and 4 have scales that are summed over.",
    )
    got = {
        mode: {g: error(find(rows, mode=mode, bits=4, granularity=TITLES[g])) for g in GRANULARITIES} for mode in MODES
    }
    plain, modulated = got["plain"], got["modulated"]
    return Shown(
        (
            "At 4 bits, a scale for each input channel in the place of one for the tensor takes plain quantization "
            f"from {number(plain['tensor'])} to {number(plain['input_channel'])} and modulation from "
            f"{number(modulated['tensor'])} to {number(modulated['input_channel'])}. Of what an integer matrix "
            f"product can run, auto is off by {number(modulated['auto'])} modulated, "
            f"{less(modulated['auto'], plain['auto'])} than plain.",
            table,
            figure,
        ),
        (
            "the paper's LCQ is channel-wise, with a scale for each input channel, and LTQ tensor-wise; the two names "
            "are swapped once in its text. A scale on the summed axis cannot be taken out of an integer sum, so the "
            "LCQ results hold for float arithmetic only. The tensor's scale here is shared by the whole batch: "
            "results depend on what is in it.",
        ),
    )


EXPERIMENT = Experiment(
    name="granularity",
    title="Granularity: what shares a scale",
    printed=(
        "CIFAR-10, W8, FID with MoDiff: LCQ (channel-wise, table 1) against LTQ (tensor-wise, table 14).",
        printed_table(
            "study-printed-granularity",
            "Tables 1 and 14 as printed, without -> with MoDiff.",
            "|LCQ|LTQ",
            ("A8|4.21 -> 4.10|4.19 -> 4.21", "A6|4.15 -> 4.21|9.93 -> 4.00", "A4|24.09 -> 4.31|306.06 -> 28.19"),
        ),
    ),
    measure=measure,
    show=show,
)
