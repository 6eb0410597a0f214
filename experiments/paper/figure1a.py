"""Figure 1a: how far a layer's output moves away while it is reused."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from experiments.charts import Line, line_chart
from experiments.configs import coded, looped
from experiments.experiment import Experiment, Shown, Values
from experiments.lab import Lab
from experiments.runs import Run
from experiments.tables import listing
from experiments.words import error, find, number
from modiff import presets
from modiff.evaluate.analysis.layers import norm
from modiff.evaluate.analysis.watch import Visit

PRINTED = 0.40
INTERVALS = {False: (2, 3, 5, 10), True: (2, 3, 4, 5, 7, 10)}


class ReuseErrors:
    """Watcher: ||o_t - o_s|| / ||o_t|| with o_s the output at the last multiple of each interval.

    Memory: one output of each layer for each interval.
    """

    def __init__(self, intervals: Sequence[int]) -> None:
        self.intervals = tuple(intervals)
        self._anchors: dict[tuple[str, int, int], Tensor] = {}
        self.errors: dict[int, dict[tuple[str, int], list[float]]] = {k: {} for k in self.intervals}

    def see(self, visit: Visit) -> None:
        """One call of a layer: keep its output, or compare with what is kept."""
        size = norm(visit.output).clamp_min(torch.finfo(torch.float64).tiny)
        for interval in self.intervals:
            place = (*visit.key, interval)
            if visit.step % interval == 0:
                self._anchors[place] = visit.output.clone()
            else:
                found = float(norm(visit.output - self._anchors[place]) / size)
                self.errors[interval].setdefault(visit.key, []).append(found)

    def spread(self, interval: int) -> dict[str, float]:
        """Quartiles over the layers of the mean over the steps between."""
        means = [float(np.mean(values)) for values in self.errors[interval].values()]
        low, middle, high = np.quantile(means, (0.25, 0.5, 0.75))
        return {"low": float(low), "median": float(middle), "high": float(high), "worst": max(means)}


def measure(lab: Lab) -> Values:
    """Deviation of the layers' outputs, and of the images when every layer reuses its output."""
    intervals = [k for k in INTERVALS[lab.settings.full] if k < lab.settings.steps]
    watcher = ReuseErrors(intervals)
    lab.watch(presets.published(None, 4), [watcher], lab.settings.steps)
    nothing = coded(presets.published(None, 8), bits=0)
    plan = [
        ({"interval": k}, Run(steps=lab.settings.steps, config=looped(nothing, reanchor_every=k))) for k in intervals
    ]
    compared = [
        ({"bits": bits}, Run(steps=lab.settings.steps, config=presets.published(None, bits))) for bits in (8, 4)
    ]
    return {
        "steps": lab.settings.steps,
        "layers": [{"interval": k, **watcher.spread(k)} for k in intervals],
        "rows": lab.rows(plan),
        "coded": lab.rows(compared),
    }


def show(values: Values) -> Shown:
    """A line for each interval."""
    images = {row["interval"]: row for row in values["rows"]}
    rows = [{**images[row["interval"]], **{f"layer_{k}": v for k, v in row.items()}} for row in values["layers"]]
    table = listing(
        "study-reuse",
        "Error of reusing outputs, by reuse interval.",
        rows,
        [
            ("layer_interval", "interval", "d"),
            ("layer_low", "layers, lower quartile", ".3f"),
            ("layer_median", "layers, median", ".3f"),
            ("layer_high", "layers, upper quartile", ".3f"),
            ("layer_worst", "worst layer", ".3f"),
            ("relative_l2", "images", "l2"),
        ],
    )
    x = [row["interval"] for row in values["layers"]]
    lines = [
        Line(
            label="a layer's output, median of the layers",
            x=x,
            y=[row["median"] for row in values["layers"]],
            band=([row["low"] for row in values["layers"]], [row["high"] for row in values["layers"]]),
        ),
        Line(label="images, all layers reused", x=x, y=[error(images[k]) for k in x]),
    ]
    modulated = error(find(values["coded"], bits=4))
    if modulated is not None:
        lines.append(Line(label="images, modulated 4 bits", level=modulated, dashed=True, colour=2))
    figure = line_chart(
        "study-figure1a",
        lines,
        title="Error of reuse",
        x="reuse interval (steps)",
        y="relative L2",
        caption="Error of reusing the outputs of all layers; the band holds the middle half of them.",
    )
    third = find(values["layers"], interval=3)
    return Shown(
        (
            f"With {values['steps']} DDIM steps, the output of the median layer is off by "
            f"{number(third.get('median'))} at interval 3 (mean over the steps between), that of the worst layer by "
            f"{number(third.get('worst'))}. The images are off by {number(error(find(values['rows'], interval=3)))}. "
            f"For comparison, 4-bit residuals at every step leave the images off by {number(modulated)}.",
            table,
            figure,
        ),
        (
            "which layers and which sampler the printed curve averages is not stated, and the deviation is that of "
            "the sampler's step size: more steps move less. The images are another quantity than the layers: all "
            "later layers and steps see reused outputs.",
        ),
    )


EXPERIMENT = Experiment(
    name="figure1a",
    title="Reuse error against reuse interval (figure 1a)",
    printed=(f"repeating outputs deviates by {PRINTED:.0%} (relative L2) already at a reuse interval of 3.",),
    measure=measure,
    show=show,
)
