"""What shares a scale: the tensor, a sample, a token, an input channel."""

from experiments.charts import curves, line_chart
from experiments.experiment import Experiment, Shown, Values, crossed, error, number, printed_table
from experiments.lab import Lab
from experiments.runs import Run, quantized_with
from modiff import presets

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
            {"granularity": title, "config": f"{mode} A{bits}", "bits": bits, "mode": mode},
            Run(steps=lab.settings.steps, config=quantized_with(make(None, bits), granularity=granularity)),
        )
        for bits in BITS[lab.settings.full]
        for mode, make in MODES.items()
        for granularity, title in TITLES.items()
    ]
    return {"steps": lab.settings.steps, "rows": lab.rows(plan)}


def show(values: Values) -> Shown:
    """The page of `values`: tables and charts, and what they say."""
    order = {title: i for i, title in enumerate(TITLES.values())}
    rows = [{**row, "order": order[row["granularity"]]} for row in values["rows"]]
    caption = f"Relative L2 (PSNR), full-precision weights, {values['steps']} DDIM steps."
    plain, modulated = (
        {name: number(error(rows, mode=mode, bits=4, granularity=title)) for name, title in TITLES.items()}
        for mode in MODES
    )
    return Shown(
        (
            "At 4 bits, a scale for each input channel instead of one for the tensor takes plain quantization from "
            f"{plain['tensor']} to {plain['input_channel']} and modulation from {modulated['tensor']} to "
            f"{modulated['input_channel']}. Of what an integer matrix product can run, auto is off by "
            f"{plain['auto']} plain and {modulated['auto']} modulated.",
            crossed(
                "study-granularities", caption, rows, down="granularity", across="config", title="a scale for each"
            ),
            line_chart(
                "study-granularity",
                curves(rows, "config", "order"),
                title="Granularity",
                x="0 tensor, 1 sample, 2 auto, 3 token, 4 input channel",
                caption="Coarse to fine; 3 (in convolutions) and 4 have scales that are summed over.",
            ),
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
