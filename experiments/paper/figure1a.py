"""Figure 1a: how far a layer's output moves away while it is reused."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from experiments.charts import Line, line_chart
from experiments.experiment import Experiment, Shown, Values, error, listing, number
from experiments.lab import Lab
from experiments.runs import PAPER, Run, looped, quantized_with
from modiff import presets
from modiff.evaluate.analysis.layers import norm
from modiff.evaluate.analysis.watch import Visit

INTERVALS = {False: (2, 3, 5, 10), True: (2, 3, 4, 5, 7, 10)}


class ReuseErrors:
    """Watcher: ||o_t - o_s|| / ||o_t|| with o_s the output at the last multiple of each interval.

    Memory: one output of each layer for each interval.
    """

    def __init__(self, intervals: Sequence[int]) -> None:
        self.intervals = tuple(intervals)
        self._reused: dict[tuple[str, int, int], Tensor] = {}
        self.errors: dict[int, dict[tuple[str, int], list[float]]] = {k: {} for k in self.intervals}

    def see(self, visit: Visit) -> None:
        """One call of a layer: keep its output, or compare with the one that was kept."""
        size = norm(visit.output).clamp_min(torch.finfo(torch.float64).tiny)
        for interval in self.intervals:
            key = (*visit.key, interval)
            if visit.step % interval == 0:
                self._reused[key] = visit.output.clone()
            else:
                difference = float(norm(visit.output - self._reused[key]) / size)
                self.errors[interval].setdefault(visit.key, []).append(difference)

    def spread(self, interval: int) -> dict[str, float]:
        """Quartiles over the layers of the mean over the steps between."""
        means = [float(np.mean(values)) for values in self.errors[interval].values()]
        low, middle, high = np.quantile(means, (0.25, 0.5, 0.75))
        return {"low": float(low), "median": float(middle), "high": float(high), "worst": max(means)}


def measure(lab: Lab) -> Values:
    """Deviation of the layers' outputs, and of the images when every layer reuses its output."""
    steps = lab.settings.steps
    intervals = [k for k in INTERVALS[lab.settings.full] if k < steps]
    watcher = ReuseErrors(intervals)
    lab.watch(presets.published(None, 4), [watcher], steps)
    nothing = quantized_with(presets.published(None, 8), bits=0)
    plan = [
        ({"interval": k}, Run(steps=steps, config=looped(nothing, replace(PAPER, reanchor_every=k)))) for k in intervals
    ]
    compared = [({"bits": bits}, Run(steps=steps, config=presets.published(None, bits))) for bits in (8, 4)]
    return {
        "steps": steps,
        "layers": [{"interval": k, **watcher.spread(k)} for k in intervals],
        "rows": lab.rows(plan),
        "coded": lab.rows(compared),
    }


def show(values: Values) -> Shown:
    """The page of `values`: tables and charts, and what they say."""
    layers, images, modulated = values["layers"], values["rows"], error(values["coded"], bits=4)
    rows = [{**row, **{f"layer_{k}": v for k, v in layer.items()}} for row, layer in zip(images, layers, strict=True)]
    columns = (
        "interval: d; layer_low: .3f = layers, lower quartile; layer_median: .3f = layers, median; "
        "layer_high: .3f = layers, upper quartile; layer_worst: .3f = worst layer; relative_l2: l2 = images"
    )
    x = [row["interval"] for row in layers]
    low, median, high = ([row[key] for row in layers] for key in ("low", "median", "high"))
    lines = [
        Line(label="a layer's output, median of the layers", x=x, y=median, band=(low, high)),
        Line(label="images, all layers reused", x=x, y=[row["relative_l2"] for row in images]),
    ]
    if modulated is not None:
        lines.append(Line(label="images, modulated 4 bits", level=modulated, dashed=True, colour=2))
    third = next((row for row in layers if row["interval"] == 3), {})
    return Shown(
        (
            f"With {values['steps']} DDIM steps, at interval 3, the output of the median layer is off by "
            f"{number(third.get('median'))} (mean over the steps between), that of the worst layer by "
            f"{number(third.get('worst'))}, and the images by {number(error(images, interval=3))}. 4-bit residuals at "
            f"every step leave the images off by {number(modulated)}.",
            listing("study-reuse", "Error of reusing outputs, by reuse interval.", rows, columns),
            line_chart(
                "study-figure1a",
                lines,
                title="Error of reuse",
                x="reuse interval (steps)",
                y="relative L2",
                caption="Error of reusing the outputs of all layers; the band holds the middle half of them.",
            ),
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
    printed=("repeating outputs deviates by 40% (relative L2) already at a reuse interval of 3.",),
    measure=measure,
    show=show,
)
