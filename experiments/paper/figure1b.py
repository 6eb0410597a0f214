"""Figure 1b: activations and temporal differences, how wide each is."""

import itertools

import numpy as np

from experiments.charts import Line, line_chart
from experiments.experiment import Experiment, Shown, Values, listing
from experiments.lab import Lab
from modiff import presets
from modiff.evaluate.analysis.layers import Distribution, LayerTrace, LayerTraces

SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)


def measure(lab: Lab) -> Values:
    """Histograms of all layers pooled, and the ratio of the ranges for each layer and step."""
    distribution, errors = Distribution(), LayerTraces()
    lab.watch(presets.published(None, 8), [distribution, errors], lab.settings.steps)
    result = distribution.result()
    ratios = {trace["name"]: _ratios(trace) for trace in errors.layers()}
    everywhere = [value for ranges, _ in ratios.values() for value in ranges]
    quantiles = [(q, float(np.quantile(everywhere, q))) for q in SHARES]
    return {
        "steps": lab.settings.steps,
        "edges": result["edges"],
        "pooled": {key: result[key] for key in ("activation", "difference")},
        "layers": [
            {"name": name, "range": float(np.median(ranges)), "rms": float(np.median(sizes))}
            for name, (ranges, sizes) in ratios.items()
            if ranges
        ],
        "quantiles": [{"share": q, "range": value, "bits": float(np.log2(value))} for q, value in quantiles],
        "wider": float(np.mean([value < 1 for value in everywhere])),
        "tenfold": float(np.mean([value >= 10 for value in everywhere])),
    }


def _ratios(trace: LayerTrace) -> tuple[list[float], list[float]]:
    """Activation over residual at each step after the first: largest magnitude, root mean square."""
    ranges: list[float] = []
    sizes: list[float] = []
    for step in trace["steps"]:
        if step["residual_min"] is None or step["residual_max"] is None or not step["residual_rms"]:
            continue
        activation = max(abs(step["activation_min"]), abs(step["activation_max"]))
        ranges.append(activation / max(abs(step["residual_min"]), abs(step["residual_max"])))
        sizes.append(step["activation_rms"] / step["residual_rms"])
    return ranges, sizes


def show(values: Values) -> Shown:
    """The page of `values`: tables and charts, and what they say."""
    table = listing(
        "study-ranges",
        "Largest |activation| over largest |residual|, over all layers and steps but the first.",
        [{**row, "share": f"{row['share']:.0%}"} for row in values["quantiles"]],
        "share = this share of layers and steps is below; range: .2f = ratio; bits: .2f = bits saved",
    )
    middle = [(a + b) / 2 for a, b in itertools.pairwise(values["edges"])]
    pooled = values["pooled"]
    lines = [
        Line(label=label, x=middle, y=[n / max(1, sum(pooled[key])) for n in pooled[key]], marked=False, colour=c)
        for key, label, c in (("activation", "activation", 3), ("difference", "temporal difference", 0))
    ]
    figure = line_chart(
        "study-figure1b",
        lines,
        title="Activations and temporal differences",
        x="value / largest |activation| of the layer",
        y="share of values per bin",
        caption="All layers and steps but the first, pooled; 255 bins.",
    )
    half = values["quantiles"][SHARES.index(0.5)]
    return Shown(
        (
            f"With {values['steps']} DDIM steps the residual's range is {half['range']:.1f} times smaller than the "
            f"activation's in the median, worth {half['bits']:.1f} bits; 10 times or more in {values['tenfold']:.0%} "
            f"of all layers and steps, and larger than the activation's in {values['wider']:.1%}. The quantizer pays "
            "for ranges, not for typical values: the tails in the figure are what counts.",
            table,
            figure,
        ),
        (
            "the ratio follows from the step size of the sampler and from the model; the residual here also holds the "
            "rounding error of the step before, at 8 bits a small part of it.",
        ),
    )


EXPERIMENT = Experiment(
    name="figure1b",
    title="Distribution of activations and temporal differences (figure 1b)",
    printed=(
        "histograms in which differences of neighbouring steps are far narrower than activations. A range 10 times "
        "smaller would be worth log2(10) = 3.3 bits by its Theorem 4.3.",
    ),
    measure=measure,
    show=show,
)
