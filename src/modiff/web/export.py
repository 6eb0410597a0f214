"""A result as files: a report that needs no other file, and the configuration for `modiff.apply`."""

import json
import secrets
from collections.abc import Sequence
from pathlib import Path

from modiff.evaluate.report.charts import image_figures
from modiff.evaluate.report.document import Cell, Column, Document, Section, Table, Verbatim
from modiff.evaluate.report.page import html_page
from modiff.files import write_atomically, write_json
from modiff.generate.environment import environment
from modiff.web.compare import Compared
from modiff.web.views import LAYER_HEAD, in_words, layer_rows, measures


def export(done: Compared, folder: Path) -> tuple[Path, Path | None]:
    """Write the report, and the configuration if there is one, to a new folder in `folder`."""
    place = folder / secrets.token_hex(8)
    report = place / "modiff-report.html"
    page = html_page(document(done)).encode()
    write_atomically(report, lambda file: file.write(page))
    if done.config is None:
        return report, None
    config = place / "modiff-config.json"
    write_json(config, done.config.to_dict())
    return report, config


def document(done: Compared) -> Document:
    """The report of a comparison."""
    settings, conditions = done.settings, done.settings.conditions.to_dict()
    drawn = [f"{key} {value}" for key, value in conditions.items() if value]
    lead = f"{done.pipeline}, {settings.steps} steps, {settings.num_images} images from seed {settings.seed}"
    columns = (Column("", numeric=False), Column("full precision"), Column(settings.name))
    times = Table("figures", "Time and error.", columns, _cells(measures(done)))
    runs = [("full precision", done.full), (settings.name, done.quantized)]
    images = image_figures([(name, run.bytes) for name, run in runs if run is not None], settings.seed)
    sections = [Section("Result", (in_words(done), times)), Section("Images", tuple(images))]
    if done.heat is not None:
        sections.append(Section("Where the error arises", (done.heat,)))
    if done.report is not None:
        columns = tuple(Column(title, numeric=False) for title in LAYER_HEAD)
        table = Table("layers", "Every layer.", columns, _cells(layer_rows(done)))
        sections.append(Section("Layers", (str(done.report).partition("\n")[0], table)))
    values = json.dumps(environment(), indent=2)
    config = () if done.config is None else ("Configuration, for modiff.apply:", Verbatim(done.config.to_json()))
    sections.append(Section("Settings", (*config, "Where it ran:", Verbatim(values))))
    title = f"{settings.model}: full precision and {settings.name}"
    return Document(title, f"{', '.join([lead, *drawn])}. All from the same noise.", tuple(sections))


def _cells(rows: Sequence[Sequence[str]]) -> tuple[tuple[Cell, ...], ...]:
    return tuple(tuple(map(Cell, row)) for row in rows)
