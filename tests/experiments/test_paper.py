"""Every experiment: JSON values, tables and sentences that say what they hold; docs/study.md is what it writes."""

import doctest
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments import charts, experiment, paper, skipping, study
from experiments.experiment import Values
from experiments.lab import Lab, StudySettings
from experiments.paper import EXPERIMENTS, experiment_names, figure1a, figure1b, growth, table6, zero_bits
from experiments.runs import Run
from experiments.study import StudyResult
from modiff import presets
from modiff.api import apply, remove
from modiff.errors import ConfigError
from modiff.evaluate.report.document import Document, Figure, Table
from modiff.evaluate.report.page import html_page, markdown
from modiff.hosts.diffusers.runs import unconditional_run
from modiff.model.trajectory import state_bytes
from tests.experiments.fakes import FakeLab, halving
from tests.pixels import pixel_pipeline

DOCS = Path(__file__).parents[2] / "docs"
WATCHED = {"figure1a", "figure1b", "growth", "table6"}
SAMPLED = [name for name in EXPERIMENTS if name not in WATCHED]
Draw = Callable[..., bytes]


@pytest.fixture(autouse=True)
def draw(monkeypatch: pytest.MonkeyPatch) -> Draw:
    """Pictures take most of the time; one test draws them."""
    draws = charts._picture
    monkeypatch.setattr(charts, "_picture", lambda *axes: b"\x89PNG\r\n" + repr(axes).encode())
    return draws


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
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


def test_the_page_of_the_docs_is_what_the_recorded_results_give() -> None:
    results = StudyResult.from_dict(json.loads((DOCS / "results" / "study.json").read_text()))
    assert tuple(results.values) == tuple(EXPERIMENTS)
    assert markdown(results.document("embedded"), "figures") == (DOCS / "study.md").read_text()


@pytest.mark.parametrize("depth", ["quick", "full"])
@pytest.mark.parametrize("name", SAMPLED)
def test_an_experiment_survives_its_json_and_is_a_section_with_figures(name: str, depth: Any) -> None:
    fake = FakeLab(depth=depth)
    text, _, figures = shown(name, EXPERIMENTS[name].measure(fake))
    assert figures
    assert all(f.name.startswith("study-") for f in figures)
    assert "no figure" not in text
    assert len(fake.plan) > 5


@pytest.mark.parametrize("name", SAMPLED)
def test_runs_that_diverged_leave_gaps(name: str) -> None:
    text, tables, _ = shown(name, EXPERIMENTS[name].measure(FakeLab(lambda run: None if run.config else 0.1)))
    assert any(c.text == "diverged" for t in tables.values() for row in t.rows for c in row)
    assert "nan" not in text


def test_figures_are_drawn(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts, "_picture", draw)
    assert all(len(f.data) > 5000 for f in shown("table2", EXPERIMENTS["table2"].measure(FakeLab()))[2])


@pytest.mark.parametrize(
    ("name", "table", "line", "column", "text"),
    [
        ("table2", "study-bits", "4", "plain", "0.0500"),
        ("table2", "study-bits", "4", "modulated", "0.0125"),
        ("table4", "study-ablation", "6", "modulation only", "0.0063"),
        ("samplers", "study-samplers-steps", "ddpm 20", "modulated A4", "0.0125"),
        ("table18", "study-first-step", "plain, first step in full precision", "A4", "0.0250"),
        ("table18", "study-first-step", "modulated, first step in 2 coded rounds", "A4", "0.0156"),
        ("table18", "study-first-step", "no compensation, first step coded once", "A4", "0.0375"),
        ("clip", "study-clips", "0.4", "modulated A3", "0.0250"),
    ],
)
def test_tables_hold_each_run_in_its_cell(name: str, table: str, line: str, column: str, text: str) -> None:
    assert cell(shown(name, EXPERIMENTS[name].measure(FakeLab()))[1][table], line, column) == text


def test_sentences_hold_the_figures() -> None:
    def text(name: str, error: Any = halving) -> str:
        return shown(name, EXPERIMENTS[name].measure(FakeLab(error)))[0]

    assert "is 0.05 off, 4-bit modulated 0.0125, 4 times less. The 8-bit weights alone are 0.001 off" in text("table2")
    assert "here at W8A4 the factors are 2 and 2." in text("table4")
    assert "0.0188 with a first step coded once and 0.0133 after four rounds" in text("table18")
    few = text("table17", lambda run: 0.4 if run.config.layer.modulation is None else 0.4 / run.steps)
    assert "a factor of 2 (2 steps), 4 (4 steps), 8 (8 steps), against 20 with 20 steps" in few
    clips = text("clip", lambda run: abs(run.config.layer.activation.clip - 0.6) + 0.1)
    assert "modulated A4 0.6; modulated A3 0.6" in clips


@pytest.mark.parametrize(("at_half", "wins"), [(0.2, 0), (0.05, 16), (0.001, 24)])
def test_zero_bits_are_judged_against_fewer_steps_at_equal_operations(at_half: float, wins: int) -> None:
    """Fewer steps: error 1 / steps. Silence at threshold t: 1 - 5 t of the operations; the error as given."""

    def error(run: Run) -> float:
        return at_half if run.skip else 1 / run.steps

    fake = FakeLab(error, share=lambda run: 1 - 5 * run.skip.threshold if run.skip else 1.0)
    (base,) = (values := zero_bits.measure(fake))["bases"]
    row = next(r for r in base["skipping"] if r["threshold"] == 0.1)
    assert (row["share"], row["ddim_equal"]) == pytest.approx((0.5, 1 / 10))
    assert f"silence beats fewer DDIM steps in {wins} of 24 settings;" in shown("zero-bits", values)[0]


def test_a_setting_that_saved_nothing_wins_nothing() -> None:
    row = {"relative_l2": 0.0, "ddim_equal": 0.1, "ddim_limit_equal": 0.1, "to_limit": 0.2, "share": 0.9}
    assert zero_bits.beats(row, "ddim_equal")
    for change in ({"share": 1.0}, {"ddim_equal": None}, {"relative_l2": None}):
        assert not zero_bits.beats(row | change, "ddim_equal")
    assert not zero_bits.beats(row, "ddim_limit_equal")
    assert zero_bits.beats(row | {"to_limit": 0.05}, "ddim_limit_equal")


def test_the_error_of_fewer_steps_is_read_between_runs_only() -> None:
    curve = [(0.5, 0.01), (1.0, 0.0), (0.25, 0.04)]
    for share, value in ((0.5, 0.01), (0.25, 0.04), (0.5**1.5, 0.02), (0.9, 0.002)):  # a straight line in logs
        assert zero_bits.at_share(curve, share) == pytest.approx(value)
    assert zero_bits.at_share(curve, 0.2) is zero_bits.at_share(curve, 1.1) is zero_bits.at_share([], 0.5) is None


def test_zero_bits_run_on_a_pipeline(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("THRESHOLDS", {False: (0.2,)}), ("SHARES", {False: (0.5,)}), ("LIMIT", 1)):
        monkeypatch.setattr(zero_bits, name, value)
    (base,) = zero_bits.measure(lab)["bases"]
    shares = {(r["unit"], r["predictor"]): r["share"] for r in base["skipping"]}
    assert all(0.1 < share < 0.95 for share in shares.values())
    assert len({round(s, 9) for s in shares.values()}) > 4


def test_reuse_errors_of_the_layers_equal_a_loop_over_their_outputs(lab: Lab) -> None:
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


def test_figures_1a_and_1b_and_growth_on_a_pipeline(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_memory_counts_both_states_and_equals_state_bytes(lab: Lab) -> None:
    values = table6.measure(lab)
    by = {(row["states"], row["batch"]): row["input"] + row["output"] for row in values["rows"]}
    both = by["hold, float32", 2]
    assert by["hold, float16", 2] == pytest.approx(both / 2)
    assert by["linear, float32", 2] == pytest.approx(2 * both)
    pipe, sizes = pixel_pipeline(), []
    apply(pipe, presets.modulated(8, 4))
    pipe.unet.register_forward_hook(lambda model, *_: sizes.append(state_bytes(model)))
    unconditional_run(pipe, 2, 2, 0)()
    remove(pipe)
    assert both * 2**20 == pytest.approx(sizes[-1])
    assert f"the states hold {by['hold, float32', 8]:.1f} MiB" in shown("table6", values)[0]


def test_every_experiment_has_one_name_and_the_names_of_tables_are_known() -> None:
    assert experiment_names(["all"]) == tuple(EXPERIMENTS)
    assert experiment_names(["zero-bits", "figure1a", "table5", "table16"]) == ("figure1a", "samplers", "zero-bits")
    with pytest.raises(ConfigError, match=r"got table3\. Use for example: python -m experiments figure1a table4"):
        experiment_names(["table3"])


@pytest.mark.parametrize("module", [paper, study, zero_bits, skipping, experiment])
def test_the_examples_in_the_docstrings_hold(module: Any) -> None:
    result = doctest.testmod(module)
    assert (result.failed, result.attempted > 0) == (0, True)
