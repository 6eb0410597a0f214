"""Every experiment: JSON values, tables and sentences that say what they hold; the page that docs show of them."""

import doctest
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import charts, experiment, paper, skipping, study
from experiments.experiment import Values
from experiments.lab import Lab, StudySettings
from experiments.paper import EXPERIMENTS, figure1a, figure1b, growth, table6, zero_bits
from experiments.runs import Run
from experiments.study import StudyResult
from modiff import presets
from modiff.api import apply, remove
from modiff.evaluate.report.document import Document, Figure, Table
from modiff.evaluate.report.page import html_page, markdown
from modiff.hosts.diffusers.runs import calibration_run
from modiff.model.trajectory import state_bytes
from tests.experiments.fakes import FakeLab
from tests.pixels import pixel_pipeline

DOCS = Path(__file__).parents[2] / "docs"
WATCHED = {"figure1a", "figure1b", "growth", "table6"}
SAMPLED = [name for name in EXPERIMENTS if name not in WATCHED]


@pytest.fixture(autouse=True)
def _undrawn(monkeypatch):
    """Pictures take most of the time; the test of the command draws them."""
    monkeypatch.setattr(charts, "_picture", lambda *axes: b"\x89PNG\r\n" + repr(axes).encode())


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    settings = StudySettings(num_images=2, steps=10)
    return Lab(pixel_pipeline(), settings, tmp_path_factory.mktemp("runs"), progress=False)


def shown(name: str, values: Values) -> tuple[str, dict[str, Table], list[Figure]]:
    """The text, tables and figures of a section made from the values' JSON, as a report shows them."""
    section = EXPERIMENTS[name].section(json.loads(json.dumps(values, allow_nan=False)), "command")
    document = Document("Study", "Lead.", (section,))
    assert html_page(document)
    assert markdown(document)
    text = " ".join(b for b in section.blocks if isinstance(b, str))
    assert re.search(r"The paper: \w.* Here: \w.* Why they differ: \w", text)
    assert "  " not in text
    tables = {b.name: b for b in section.blocks if isinstance(b, Table)}
    assert all(table.rows for table in tables.values())
    return text, tables, document.figures()


def cell(table: Table, line: str, column: str) -> str:
    heads = [c.title for c in table.columns]
    (row,) = [row for row in table.rows if row[0].text == line]
    return row[heads.index(column)].text


def test_the_page_of_the_docs_is_what_the_recorded_results_give():
    results = StudyResult.from_dict(json.loads((DOCS / "results" / "study.json").read_text()))
    assert tuple(results.values) == tuple(EXPERIMENTS)
    assert markdown(results.document("embedded"), "../figures") == (DOCS / "project" / "study.md").read_text()


@pytest.mark.parametrize("name", SAMPLED)
def test_an_experiment_survives_its_json_and_is_a_section_with_figures(name):
    fake = FakeLab(depth="full")
    text, _, figures = shown(name, EXPERIMENTS[name].measure(fake))
    assert figures
    assert all(f.name.startswith("study-") for f in figures)
    assert "no figure" not in text
    assert len(fake.plan) > 5
    text, tables, _ = shown(name, EXPERIMENTS[name].measure(FakeLab(lambda run: None if run.config else 0.1)))
    assert any(c.text == "diverged" for t in tables.values() for row in t.rows for c in row)
    assert "nan" not in text


@pytest.mark.parametrize(
    ("name", "table", "line", "column", "text"),
    [
        ("table2", "study-bits", "4", "plain", "0.0500"),
        ("table4", "study-ablation", "6", "modulation only", "0.0063"),
        ("samplers", "study-samplers-steps", "ddpm 20", "modulated A4", "0.0125"),
        ("samplers", "study-samplers-parallel", "parallel ddim 20", "full precision", "0.0500"),
        ("table18", "study-first-step", "no compensation, first step coded once", "A4", "0.0375"),
        ("clip", "study-clips", "0.4", "modulated A3", "0.0250"),
    ],
)
def test_tables_hold_each_run_in_its_cell(name, table, line, column, text):
    assert cell(shown(name, EXPERIMENTS[name].measure(FakeLab()))[1][table], line, column) == text


@pytest.mark.parametrize(("at_half", "wins"), [(0.2, 0), (0.05, 16)])
def test_zero_bits_are_judged_against_fewer_steps_at_equal_operations(at_half, wins):
    """Fewer steps: error 1 / steps. Silence at threshold t: 1 - 5 t of the operations; the error as given."""

    def error(run: Run) -> float:
        return at_half if run.skip else 1 / run.steps

    fake = FakeLab(error, share=lambda run: 1 - 5 * run.skip.threshold if run.skip else 1.0)
    (base,) = (values := zero_bits.measure(fake))["bases"]
    row = next(r for r in base["skipping"] if r["threshold"] == 0.1)
    assert (row["share"], row["ddim_equal"]) == pytest.approx((0.5, 1 / 10))
    assert f"silence beats fewer DDIM steps in {wins} of 24 settings;" in shown("zero-bits", values)[0]


def test_reuse_errors_of_the_layers_equal_a_loop_over_their_outputs(lab):
    pipe, name = pixel_pipeline(), "mid_block.resnets.0.conv1"
    outputs: list[torch.Tensor] = []
    watcher = figure1a.ReuseErrors((3, 4))
    lab = Lab(pipe, lab.settings, lab.folder, progress=False)
    pipe.unet.get_submodule(name).register_forward_hook(lambda _, __, out: outputs.append(out.double()))
    lab.watch(presets.modulated(None, 4), [watcher], 10)
    for interval in (3, 4):
        expected = [
            float((o - outputs[t - t % interval]).norm() / o.norm()) for t, o in enumerate(outputs) if t % interval
        ]
        assert watcher.errors[interval][name, 0] == pytest.approx(expected, rel=1e-5)


def test_figures_1a_and_1b_and_growth_on_a_pipeline(lab, monkeypatch):
    values = figure1a.measure(lab)
    text, tables, _ = shown("figure1a", values)
    assert [row[0].text for row in tables["study-reuse"].rows] == ["2", "3", "5"]
    assert f"the median layer is off by {values['layers'][1]['median']:.3g}" in text
    assert 0 < values["rows"][0]["relative_l2"] < values["rows"][2]["relative_l2"]
    values = figure1b.measure(lab)
    ranges = [row["range"] for row in values["quantiles"]]
    assert 2 < ranges[2] < 100
    assert f"worth {np.log2(ranges[2]):.1f} bits" in shown("figure1b", values)[0]
    monkeypatch.setattr(growth, "STEPS", {False: 31})
    values = growth.measure(lab)
    (four,) = values["growth"]
    assert four["compensated"]["exceeded"] == four["uncompensated"]["exceeded"] == 0
    assert four["uncompensated"]["error"][-1] > 2 * four["compensated"]["error"][-1]
    assert [row[2].text for row in shown("growth", values)[1]["study-growth-steps"].rows] == ["1", "3", "10", "30"] * 2


def test_memory_counts_both_states_and_equals_state_bytes(lab):
    values = table6.measure(lab)
    by = {(row["states"], row["batch"]): row["input"] + row["output"] for row in values["rows"]}
    both = by["hold, float32", 2]
    assert by["hold, float16", 2] == pytest.approx(both / 2)
    assert by["linear, float32", 2] == pytest.approx(2 * both)
    pipe, sizes = pixel_pipeline(), []
    apply(pipe, presets.modulated(8, 4))
    pipe.unet.register_forward_hook(lambda model, *_: sizes.append(state_bytes(model)))
    calibration_run(pipe, steps=2, batch=2)(0)
    remove(pipe)
    assert both * 2**20 == pytest.approx(sizes[-1])
    assert f"the states hold {by['hold, float32', 8]:.1f} MiB" in shown("table6", values)[0]


@pytest.mark.parametrize("module", [paper, study, zero_bits, skipping, experiment])
def test_the_examples_in_the_docstrings_hold(module):
    result = doctest.testmod(module)
    assert (result.failed, result.attempted > 0) == (0, True)
