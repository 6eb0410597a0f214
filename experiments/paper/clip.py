"""The clip ratio: a finer grid for small residuals, at the price of saturated large ones."""

from experiments.charts import curves, line_chart
from experiments.experiment import Experiment, Shown, Values, crossed
from experiments.lab import Lab
from experiments.runs import Run, quantized_with
from modiff import presets

CLIPS = {False: (1.0, 0.8, 0.6, 0.4), True: (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)}
CONFIGS = {
    "modulated A4": presets.published(None, 4),
    "modulated A3": presets.published(None, 3),
    "modulated A2": presets.published(None, 2),
    "no compensation A4": presets.uncompensated(None, 4),
    "plain A4": presets.plain(None, 4),
}


def measure(lab: Lab) -> Values:
    """Every config at every ratio."""
    plan = [
        ({"config": name, "clip": clip}, Run(steps=lab.settings.steps, config=quantized_with(config, clip=clip)))
        for name, config in CONFIGS.items()
        for clip in CLIPS[lab.settings.full]
    ]
    return {"steps": lab.settings.steps, "rows": lab.rows(plan)}


def show(values: Values) -> Shown:
    """The page of `values`: tables and charts, and what they say."""
    rows = values["rows"]
    caption = f"Relative L2 (PSNR), full-precision weights, {values['steps']} DDIM steps."
    return Shown(
        (
            f"The best ratios: {'; '.join(f'{name} {_best(rows, name)}' for name in CONFIGS)}. In the closed loop what "
            "saturates is sent again at the next step; in the open loop and in plain quantization it is lost.",
            crossed("study-clips", caption, rows, down="clip", across="config", title="clip ratio"),
            line_chart(
                "study-clip",
                curves(rows, "config", "clip"),
                title="Clip ratio",
                x="clip ratio",
                caption="1 covers the largest residual; below, codes saturate.",
            ),
        ),
        ("the paper covers the whole range (ratio 1) everywhere; there is nothing to compare with.",),
    )


def _best(rows: list[dict[str, object]], name: str) -> object:
    known = [(row["relative_l2"], row["clip"]) for row in rows if row["config"] == name and row["relative_l2"]]
    return min(known)[1] if known else "none"


EXPERIMENT = Experiment(
    name="clip",
    title="Clip ratio",
    printed=("nothing: its dynamic quantizers cover the range from minimum to maximum.",),
    measure=measure,
    show=show,
)
