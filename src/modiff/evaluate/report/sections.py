"""A finished suite as the sections of a report."""

import shlex
from collections.abc import Sequence

from modiff.evaluate.analysis.layers import LayerTrace
from modiff.evaluate.report.charts import GAIN, Point, image_figures, layer_figure, pareto
from modiff.evaluate.report.conclusion import conclusion
from modiff.evaluate.report.document import Cell, Column, Content, Document, Section, Table, Verbatim
from modiff.evaluate.suite.judge import DATA, FULL, Measurement
from modiff.evaluate.suite.plans import STEPS, Plan
from modiff.evaluate.suite.run import Row, Suite

COSTS = ("gbops", "state_mib", "seconds")
FORMS = {"psnr_db": ".2f", "ssim": ".4f", "relative_l2": ".4f", "state_mib": ".2f", "seconds": ".1f",
         "score": ".3f", "lpips": ".4f", "clip_score": ".2f"}  # fmt: skip
LEAD = (
    "Every configuration starts from the same seeds. Errors are against full precision with all its steps; fewer "
    "sampler steps are the opponent that every method has to beat. Brackets are 95 % intervals."
)
CAPTIONS = {
    "paired": "Image by image against full precision, and how the images look to the classifier.",
    "costs": "What each configuration costs.",
    "as-sets": "All images of each configuration against all of full precision, from the same seeds.",
    "to-reference": "All images of each configuration against the reference data.",
}
IMAGES = (
    "The first images, none chosen, from the same noise in every row. Next to each configuration is its difference to "
    f"full precision, {GAIN} times as strong in all of them: red is brighter, blue is darker, white is equal."
)
HEAT_CAPTION = (
    "Error of every layer's output at every step in configuration {name}, {images} images: each layer is fed with the "
    "inputs it has in full precision, so that errors of layers before it do not count. Dark or empty: exact."
)


def suite_document(
    suite: Suite,
    command: Sequence[str],
    *,
    title: str = "Evaluation",
    watched: tuple[Plan, int, Sequence[LayerTrace]] | None = None,
) -> Document:
    """The report of a suite that `command` ran. watched: from `watched_layers`."""
    images = [(row.plan.name, samples) for row, samples in zip(suite.rows, suite.samples, strict=True)]
    heat: list[Section] = []
    if watched is not None and watched[2]:
        caption = HEAT_CAPTION.format(name=watched[0].name, images=watched[1])
        heat.append(Section("Where the error arises", (layer_figure(watched[2], caption),)))
    sections = [
        _results(suite),
        Section("Images", (IMAGES, *image_figures(images, int(suite.settings.get("seed", 0))))),
        _cost_against_error(suite),
        *heat,
        _environment(suite, command),
        Section("Every figure", (_everything(suite.rows),)),
    ]
    return Document(title, LEAD, tuple(sections), conclusion(suite))


def _results(suite: Suite) -> Section:
    names = [name for name in _metric_names(suite.rows) if name not in COSTS]
    sets, real = ([name for name in names if name.endswith(f"_to_{against}")] for against in (FULL, DATA))
    paired = [name for name in names if name not in (*sets, *real)]
    blocks: list[Content] = [_summary(suite.rows, paired, "paired"), _summary(suite.rows, COSTS, "costs")]
    blocks += [_summary(suite.rows, sets, "as-sets")] if sets else []
    settings = suite.settings
    features = f"Features: {settings['extractor']}, {settings['extractor_dimension']} numbers an image."
    blocks.append(f"{features if sets else ''} {settings['extractor_note'] or ''}".strip())
    halves = suite.rows[0].metric("fd_between_halves")
    if halves is not None and halves["value"] is not None:
        blocks.append(f"{halves['label']}: {halves['value']:.4g}. {halves['note']}")
    if real:
        blocks.append(_summary(suite.rows, real, "to-reference"))
    return Section("Results", tuple(blocks))


def _metric_names(rows: Sequence[Row]) -> list[str]:
    """All names in the order in which they first occur, those of quantized rows first; without the noise floor."""
    ordered = [m["name"] for row in (*rows[1:], rows[0]) for m in row.metrics]
    return [name for name in dict.fromkeys(ordered) if name != "fd_between_halves"]


def _summary(rows: Sequence[Row], metrics: Sequence[str], table: str) -> Table:
    known = {m["name"]: m for row in sorted(rows, key=lambda row: -row.broken) for m in row.metrics}
    shown = [name for name in metrics if name in known]
    columns = [Column("configuration", numeric=False), Column("steps")]
    columns += [Column(known[name]["label"], note=known[name]["note"]) for name in shown]
    names = [Cell(row.plan.name, None, f"{row.broken} images not finite" * bool(row.broken)) for row in rows]
    body = tuple(
        (name, Cell.number(row.plan.steps, "d"), *(_measured(row.metric(metric)) for metric in shown))
        for name, row in zip(names, rows, strict=True)
    )
    return Table(table, CAPTIONS[table], tuple(columns), body)


def _measured(metric: Measurement | None) -> Cell:
    if metric is None:
        return Cell("-")
    form = FORMS.get(metric["name"], ".4g")
    if metric["name"] == "gbops" and metric["value"] is not None and metric["value"] >= 100:
        form = ",.0f"
    return Cell.number(metric["value"], form, metric["low"], metric["high"])


def _cost_against_error(suite: Suite) -> Section:
    names = _metric_names(suite.rows)
    distance = "fd_to_reference" if "fd_to_reference" in names else "fd_to_full_precision"
    errors = {"relative_l2": "relative L2 to full precision"}
    errors |= {m["name"]: m["label"] for row in suite.rows for m in row.metrics if m["name"] == distance}
    blocks: list[Content] = [
        "Lower left is better. What lies above the dashed line or to its right is beaten by the unquantized model with "
        "as many steps or fewer. Bit-operations are not speed: time is what was measured here, with integers simulated "
        "in floats where a row does not say that it runs on them."
    ]
    for metric, error in errors.items():
        for cost, axis in (("gbops", "GBOPs of one image"), ("seconds", "seconds for one image, measured")):
            name = f"{metric}-by-{cost}".replace("_", "-")
            caption = f"{error[0].upper()}{error[1:]} against {axis}."
            points = [_point(row, metric, cost) for row in suite.rows]
            if any(p.error for p in points if p.family == STEPS):  # fewer steps may change nothing that 8 bits show
                blocks.append(pareto(name, points, cost=axis, error=error, caption=caption))
    return Section("Error against cost", tuple(blocks))


def _point(row: Row, metric: str, cost: str) -> Point:
    error, price = row.metric(metric), row.metric(cost)
    paid = 0.0 if price is None or price["value"] is None else price["value"] / price["n"]
    family, name = row.plan.family, row.plan.name
    label = f"{row.plan.steps} steps" if family == STEPS else name.removeprefix(family).strip() or name
    if error is None:  # full precision against itself
        return Point(label, family, paid, 0.0)
    return Point(label, family, paid, error["value"], error["low"], error["high"])


def _everything(rows: Sequence[Row]) -> Table:
    columns = (
        Column("configuration", numeric=False), Column("figure", numeric=False), Column("value"), Column("low"),
        Column("high"), Column("n"), Column("note", numeric=False),
    )  # fmt: skip
    body = tuple(
        (
            Cell(row.plan.name), Cell(m["label"]), *(Cell.number(m[key]) for key in ("value", "low", "high")),
            Cell.number(m["n"], "d"), Cell(m["note"]),
        )
        for row in rows
        for m in row.metrics
    )  # fmt: skip
    return Table("figures", "All figures with their 95 % intervals and number of images.", columns, body)


def _environment(suite: Suite, command: Sequence[str]) -> Section:
    shown = {key: value for key, value in suite.settings.items() if key != "configs"}
    shown["configurations"] = ", ".join(row.plan.name for row in suite.rows)
    tables = _pairs("settings", "Settings.", shown), _pairs("environment", "Where it ran.", dict(suite.environment))
    return Section("How to get the same figures", (Verbatim(shlex.join(command)), *tables))


def _pairs(name: str, caption: str, values: dict[str, object]) -> Table:
    columns = (Column("name", numeric=False), Column("value", numeric=False))
    shown = {k: ", ".join(map(str, v)) if isinstance(v, list | tuple) else v for k, v in values.items()}
    rows = tuple((Cell(key), Cell("none" if value in (None, "") else str(value))) for key, value in shown.items())
    return Table(name, caption, columns, rows)
