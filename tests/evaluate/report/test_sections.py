"""A suite as a report: every figure of the JSON is in it, full precision and fewer steps always are."""

from __future__ import annotations

import numpy as np
import pytest

from modiff.evaluate.report.document import Document, Figure, Table, Verbatim
from modiff.evaluate.report.sections import suite_document
from modiff.evaluate.suite.plans import Preset
from modiff.evaluate.suite.run import Suite, run_suite
from tests.evaluate.suite.fakes import FakeExtractor, FakeSource

CHOSEN = Preset(num_images=10, steps=8, configs=("plain:8:4", "modulated:8:4"), fewer=(2, 4))
COMMAND = ["modiff", "evaluate", "my model"]


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    folder = tmp_path_factory.mktemp("suite")
    np.save(folder / "real.npy", FakeSource(seed=50).images(None, 8, range(12)))
    return run_suite(
        FakeSource(seed=3, steps=8), FakeExtractor(), CHOSEN, folder / "run", reference=folder / "real.npy",
        batch_size=5, resamples=10, progress=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def report(suite: Suite) -> Document:
    return suite_document(suite, COMMAND)


def block(report: Document, name: str) -> Table:
    return next(b for s in report.sections for b in s.blocks if isinstance(b, Table) and b.name == name)


def texts(table: Table) -> list[list[str]]:
    return [[cell.text for cell in row] for row in table.rows]


def test_every_figure_of_every_configuration_is_in_the_long_table(suite: Suite, report: Document) -> None:
    lines = [(row[0].text, row[1].text, row[2].value, row[-1].text) for row in block(report, "figures").rows]
    assert Verbatim("modiff evaluate 'my model'") in report.sections[-2].blocks
    assert dict(texts(block(report, "environment")))["torch"] == suite.environment["torch"]
    assert lines == [(r.plan.name, m["label"], m["value"], m["note"]) for r in suite.rows for m in r.metrics]


def test_the_short_tables_have_each_configuration_once_and_its_own_figures(suite: Suite, report: Document) -> None:
    names = [row.plan.name for row in suite.rows]
    for name in ("paired", "costs", "as-sets", "to-reference"):
        assert [line[0] for line in texts(block(report, name))] == names
    paired = block(report, "paired")
    column = [c.title for c in paired.columns].index("relative L2")
    for row, cells in zip(suite.rows[1:], paired.rows[1:], strict=True):
        value = row.metric("relative_l2")["value"]
        assert (cells[column].value, cells[column].text) == (value, f"{value:.4f}")
    assert paired.rows[0][column].text == "-"


def test_both_errors_are_drawn_against_both_costs_with_fewer_steps_in_each(report: Document) -> None:
    charts = [b for b in report.sections[2].blocks if isinstance(b, Figure)]
    assert [c.name for c in charts] == [
        "relative-l2-by-gbops", "relative-l2-by-seconds", "fd-to-reference-by-gbops", "fd-to-reference-by-seconds"
    ]  # fmt: skip
    for chart in charts:
        for part in ("8 steps", "4 steps", "2 steps", "plain W8A4", "modulated W8A4"):
            assert part in chart.alt, (chart.name, part)
