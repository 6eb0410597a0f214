"""The clip ratio: a finer grid for small residuals, at the price of saturated large ones."""

from __future__ import annotations

from experiments.charts import Line, line_chart
from experiments.configs import coded
from experiments.experiment import Experiment, Shown, Values
from experiments.lab import Lab
from experiments.runs import Run
from experiments.tables import crossed
from experiments.words import error, number, times
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
        ({"config": name, "clip": clip}, Run(steps=lab.settings.steps, config=coded(config, clip=clip)))
        for name, config in CONFIGS.items()
        for clip in CLIPS[lab.settings.full]
    ]
    return {"steps": lab.settings.steps, "rows": lab.rows(plan)}


def show(values: Values) -> Shown:
    """Ratios down, configs across."""
    rows = values["rows"]
    table = crossed(
        "study-clips",
        f"Relative L2 (PSNR), full-precision weights, {values['steps']} DDIM steps.",
        rows,
        down=("clip", "clip ratio"),
        across="config",
    )
    lines = [
        Line(
            label=name,
            x=[r["clip"] for r in rows if r["config"] == name],
            y=[error(r) for r in rows if r["config"] == name],
        )
        for name in CONFIGS
    ]
    figure = line_chart(
        "study-clip",
        lines,
        title="Clip ratio",
        x="clip ratio",
        y="relative L2 to full precision",
        caption="1 covers the largest residual; below, codes saturate.",
    )
    return Shown(
        (
            "The best ratio and its error over that of 1.0: "
            + "; ".join(_best(name, [r for r in rows if r["config"] == name]) for name in CONFIGS)
            + ". In the closed loop what saturates is sent again at the next step; in the open loop and in plain "
            "quantization it is lost.",
            table,
            figure,
        ),
        ("the paper covers the whole range (ratio 1) everywhere; there is nothing to compare with.",),
    )


def _best(name: str, rows: list[dict[str, object]]) -> str:
    known = [(value, row) for row in rows if (value := error(row)) is not None]
    if not known:
        return f"{name}: all diverged"
    least, row = min(known, key=lambda pair: pair[0])
    whole = next((value for value, r in known if r["clip"] == 1.0), None)
    return f"{name}: {row['clip']} ({number(least)}, {times(least, whole)} times)"


EXPERIMENT = Experiment(
    name="clip",
    title="Clip ratio",
    printed=("nothing: its dynamic quantizers cover the range from minimum to maximum.",),
    measure=measure,
    show=show,
)
