"""Every experiment: what it runs, that its values are JSON, and that tables and sentences say what was found."""

import json
import typing
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from experiments import charts
from experiments.experiment import StudySection
from experiments.lab import Lab
from experiments.paper import (
    clip,
    figure1a,
    figure1b,
    granularity,
    growth,
    samplers,
    state_dtype,
    table2,
    table4,
    table6,
    table17,
    table18,
    zero_bits,
    zero_bits_text,
)
from experiments.registry import EXPERIMENTS, experiment_names
from experiments.runs import Run
from experiments.settings import settings_for
from experiments.store import Store
from modiff import presets
from modiff.api import apply, remove
from modiff.config import ModiffConfig
from modiff.errors import ConfigError
from modiff.evaluate.report.document import Block, Document, Figure, Table
from modiff.evaluate.report.page import html_page, markdown
from modiff.hosts.diffusers.runs import unconditional_run
from modiff.model.trajectory import state_bytes
from tests.experiments.fake_lab import FakeLab, halving
from tests.pixels import pixel_pipeline

SAMPLED = [table2, table4, samplers, table18, clip, granularity, state_dtype, table17, zero_bits]


@pytest.fixture(autouse=True)
def pictures(monkeypatch: pytest.MonkeyPatch) -> Callable[..., bytes]:
    """No test but one needs to see the pictures, which take most of the time. Gives what draws them."""
    draws = charts._picture
    monkeypatch.setattr(charts, "_picture", lambda lines, axes: b"\x89PNG\r\n" + repr((lines, axes)).encode())
    return draws


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    settings = settings_for("quick", num_images=2, steps=10)
    return Lab(pixel_pipeline(), settings, Store(tmp_path_factory.mktemp("study"), {}), progress=False)


def shown(module: ModuleType, values: dict[str, Any]) -> tuple[str, dict[str, Table], list[Figure]]:
    """The text, tables and figures of a section made from the values' JSON, checked as a report would."""
    values = json.loads(json.dumps(values, allow_nan=False))
    experiment = module.EXPERIMENT
    found, why = experiment.show(values)
    section = StudySection(name=experiment.name, title=experiment.title, printed=experiment.printed, found=found,
                           why=why, command="modiff evaluate").section()  # fmt: skip
    document = Document("Study", "Lead.", (section,))
    assert html_page(document)
    assert markdown(document)
    blocks: tuple[Block, ...] = section.blocks
    assert [str(b)[:11] for b in blocks if isinstance(b, str) and b.startswith("The paper: ")]
    text = " ".join(b for b in blocks if isinstance(b, str))
    assert "  " not in text
    assert "Here: " in text
    assert "Why they differ: " in text
    tables = {b.name: b for b in blocks if isinstance(b, Table)}
    assert all(table.rows for table in tables.values())
    return text, tables, document.figures()


def cell(table: Table, line: str, column: str) -> str:
    heads = [c.title for c in table.columns]
    (row,) = [row for row in table.rows if row[0].text == line]
    return row[heads.index(column)].text


@pytest.mark.parametrize("depth", ["quick", "full"])
@pytest.mark.parametrize("module", SAMPLED, ids=lambda m: m.__name__.rpartition(".")[2])
def test_an_experiment_survives_its_json_and_is_a_section_with_figures(module: ModuleType, depth: str) -> None:
    fake = FakeLab(depth=depth)
    text, _, figures = shown(module, module.measure(fake))
    assert figures
    assert all(f.name.startswith("study-") for f in figures)
    assert "no figure" not in text
    assert len(fake.asked) > 5


@pytest.mark.parametrize("module", [table2, zero_bits], ids=lambda m: m.__name__.rpartition(".")[2])
def test_figures_are_drawn(module: ModuleType, pictures: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts, "_picture", pictures)
    assert all(len(f.data) > 5000 for f in shown(module, module.measure(FakeLab()))[2])


@pytest.mark.parametrize("module", SAMPLED, ids=lambda m: m.__name__.rpartition(".")[2])
def test_runs_that_diverged_leave_gaps_and_not_errors(module: ModuleType) -> None:
    values = module.measure(FakeLab(lambda run: None if run.config else 0.1))
    text, tables, _ = shown(module, values)
    assert any(c.text == "diverged" for t in tables.values() for row in t.rows for c in row)
    assert "nan" not in text


def test_table2_shows_every_width_and_mode_and_the_factor_between_them() -> None:
    text, tables, _ = shown(table2, table2.measure(FakeLab()))
    assert [row[0].text for row in tables["study-bits"].rows] == ["8", "6", "4", "3", "2"]
    assert cell(tables["study-bits"], "4", "plain") == "0.0500"
    assert cell(tables["study-bits"], "4", "modulated") == "0.0125"
    assert "4-bit plain quantization is 0.05 off, 4-bit modulated 0.0125: 4 times less" in text
    assert "8-bit weights alone are 0.001 off" in text
    assert "rises with every bit that is taken away" in text
    worse = FakeLab(lambda run: 0.001 if run.config.layer.activation.bits == 2 else halving(run))
    assert "is not monotone either" in shown(table2, table2.measure(worse))[0]


def test_table4_takes_the_ablation_apart_and_runs_it_over_more_steps() -> None:
    fake = FakeLab()
    text, tables, _ = shown(table4, table4.measure(fake))
    assert cell(tables["study-ablation"], "6", "modulation only") == "0.0063"
    assert "modulation alone 0.025, with compensation 0.0125: compensation is worth a factor of 2." in text
    assert "by a factor of 1.3 and compensation by another 5.8; here at W8A4 the factors are 2 and 2." in text
    assert {run.steps for _, run in fake.asked} == {20, 40}
    assert {run.config.layer.weight.bits for _, run in fake.asked if run.steps == 40} == {None}


def test_samplers_are_run_at_100_50_20_and_10_steps() -> None:
    fake = FakeLab(lambda run: halving(run) * (3 if run.sampler == "ddpm" else 1))
    text, tables, _ = shown(samplers, samplers.measure(fake))
    assert {(run.sampler, run.steps) for _, run in fake.asked} == {
        (s, n) for s in ("ddim", "ddpm", "dpmsolver++", "pndm") for n in (100, 50, 20, 10)
    }
    assert cell(tables["study-samplers-steps"], "ddpm 20", "modulated A4") == "0.0375"
    assert "has 3 times the error of DDIM" in text


def test_table18_tells_the_start_from_the_loop() -> None:
    fake = FakeLab()
    text, tables, _ = shown(table18, table18.measure(fake))
    assert sum(run.exact_first for _, run in fake.asked) == 2
    table = tables["study-first-step"]
    assert cell(table, "plain", "A4") == "0.0500"
    assert cell(table, "plain, first step in full precision", "A4") == "0.0250"
    assert cell(table, "modulated, first step in 2 coded rounds", "A4") == "0.0156"
    assert cell(table, "no compensation, first step coded once", "A4") == "0.0375"
    assert "after four rounds at 0.0133: 1.1 times" in text
    assert "here by 2 and, against a start coded once, 1.5" in text


def test_clip_names_the_best_ratio_of_each_config() -> None:
    def error(run: Run) -> float:
        activation = run.config.layer.activation
        return abs(activation.clip - 0.6) + 0.1 if activation.bits == 3 else 2 - activation.clip

    text, tables, _ = shown(clip, clip.measure(FakeLab(error)))
    assert "modulated A3: 0.6 (0.1, 0.2 times); modulated A2: 1.0 (1, 1 times)" in text
    assert cell(tables["study-clips"], "0.4", "modulated A3") == "0.3000"


def test_granularities_and_dtypes_are_all_run() -> None:
    fake = FakeLab()
    granularity.measure(fake)
    assert {run.config.layer.activation.granularity for _, run in fake.asked} == {
        "tensor", "sample", "auto", "token", "input_channel"
    }  # fmt: skip
    fake = FakeLab()
    text, tables, _ = shown(state_dtype, state_dtype.measure(fake))
    seen = {(run.config.layer.modulation.state_dtype, run.steps) for _, run in fake.asked}
    assert seen == {(d, n) for d in ("float32", "float64", "float16", "bfloat16") for n in (20, 40)}
    assert len(tables["study-dtypes"].columns) == 5
    assert "With 8-bit residuals and 40 steps: " in text


def test_few_steps_are_set_beside_many() -> None:
    def error(run: Run) -> float:
        plain = run.config.layer.modulation is None
        return 0.4 if plain else 0.4 / run.steps

    text, _, _ = shown(table17, table17.measure(FakeLab(error)))
    assert "a factor of 2 (2 steps), 4 (4 steps), 8 (8 steps), against 20 with 20 steps" in text


# ------------------------------------------------------------------------------------------------------- zero bits


def silence(at_half: float) -> FakeLab:
    """Fewer steps: error 1 / steps. Silence at threshold t: 1 - 5 t of the operations; the error as given."""

    def error(run: Run) -> float | None:
        return at_half if run.skip else 1 / run.steps

    return FakeLab(error, share=lambda run: 1 - 5 * run.skip.threshold if run.skip else 1.0)


def test_zero_bits_are_judged_against_fewer_steps_at_equal_operations() -> None:
    values = zero_bits.measure(silence(0.2))
    (base,) = values["bases"]
    assert {(r["unit"], r["predictor"]) for r in base["skipping"]} == {
        (u, p) for u in ("layer", "block", "sample", "token") for p in ("hold", "linear")
    }
    row = next(r for r in base["skipping"] if r["threshold"] == 0.1)
    assert row["share"] == pytest.approx(0.5)
    assert row["ddim_equal"] == pytest.approx(1 / 10)
    text, tables, _ = shown(zero_bits, values)
    assert "silence beats fewer DDIM steps in 0 of 24 settings;" in text
    assert "That is confirmed in direction: here 0.2 against 0.1, 2 times as much" in text
    assert [row[2].text for row in tables["study-zero-bits-half-20"].rows] == ["0.2000"] * 8
    better = shown(zero_bits, zero_bits.measure(silence(0.001)))[0]
    assert "silence beats fewer DDIM steps in all 24 settings" in better
    assert "refuted for this model: here 0.001 against 0.1" in better
    between = shown(zero_bits, zero_bits.measure(silence(0.05)))[0]
    assert "fewer DDIM steps in 16 of 24 settings (layer, hold: 15% to 50% saved;" in between


def test_a_setting_that_saved_nothing_wins_nothing() -> None:
    row = {"relative_l2": 0.0, "ddim_equal": 0.1, "ddim_limit_equal": 0.1, "to_limit": 0.2, "share": 1.0}
    assert not zero_bits_text.beats(row, "ddim_equal")
    assert zero_bits_text.beats({**row, "share": 0.9}, "ddim_equal")
    assert not zero_bits_text.beats({**row, "share": 0.9}, "ddim_limit_equal")
    assert zero_bits_text.beats({**row, "share": 0.9, "to_limit": 0.05}, "ddim_limit_equal")
    assert not zero_bits_text.beats({**row, "share": 0.9, "ddim_equal": None}, "ddim_equal")


def test_zero_bits_run_on_a_pipeline(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero_bits, "THRESHOLDS", {False: (0.2,)})
    monkeypatch.setattr(zero_bits, "SHARES", {False: (0.5,)})
    monkeypatch.setattr(zero_bits, "LIMIT", 1)
    (base,) = zero_bits.measure(lab)["bases"]
    shares = {(r["unit"], r["predictor"]): r["share"] for r in base["skipping"]}
    assert all(0.1 < share < 0.95 for share in shares.values())
    assert len({round(s, 9) for s in shares.values()}) > 4
    assert base["ddim"][0]["gbops"] == pytest.approx(10 * lab.cost.macs * 1024 / 1e9)


# -------------------------------------------------------------------------------------------------------- watchers


def test_reuse_errors_of_the_layers_equal_a_loop_over_their_outputs(lab: Lab) -> None:
    pipe, name = pixel_pipeline(), "mid_block.resnets.0.conv1"
    outputs: list[torch.Tensor] = []
    pipe.unet.get_submodule(name).register_forward_hook(lambda _, __, out: outputs.append(out.double()))
    watcher = figure1a.ReuseErrors((3, 4))
    lab_of = Lab(pipe, lab.settings, lab.store, progress=False)
    outputs.clear()
    lab_of.watch(presets.modulated(None, 4), [watcher], 10)
    assert len(outputs) == 10
    for interval in (3, 4):
        wanted = [
            float((o - outputs[t - t % interval]).norm() / o.norm()) for t, o in enumerate(outputs) if t % interval
        ]
        assert watcher.errors[interval][name, 0] == pytest.approx(wanted, rel=1e-5)
        means = sorted(float(np.mean(v)) for v in watcher.errors[interval].values())
        spread = watcher.spread(interval)
        assert (spread["worst"], spread["median"]) == pytest.approx((means[-1], np.median(means)))


def test_figure1a_and_1b_and_growth_on_a_pipeline(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    text, tables, _ = shown(figure1a, values := figure1a.measure(lab))
    assert [row[0].text for row in tables["study-reuse"].rows] == ["2", "3", "5"]
    assert f"{values['layers'][1]['median']:.3g} at interval 3" in text
    errors = [row["relative_l2"] for row in values["rows"]]
    assert 0 < errors[0] < errors[2]
    text, _, _ = shown(figure1b, values := figure1b.measure(lab))
    quantiles = [row["range"] for row in values["quantiles"]]
    assert quantiles == sorted(quantiles)
    assert 2 < quantiles[2] < 100
    assert f"worth {np.log2(quantiles[2]):.1f} bits" in text
    assert len(values["pooled"]["activation"]) == len(values["edges"]) - 1
    monkeypatch.setattr(growth, "STEPS", {False: 31})
    text, tables, figures = shown(growth, values := growth.measure(lab))
    (found,) = values["growth"]
    assert found["compensated"]["exceeded"] == found["uncompensated"]["exceeded"] == 0
    assert found["uncompensated"]["error"][-1] > 2 * found["compensated"]["error"][-1]
    assert [f.name for f in figures] == ["study-growth-uncompensated", "study-growth-compensated"]
    assert [row[2].text for row in tables["study-growth-steps"].rows] == ["1", "3", "10", "30"] * 2
    assert "over 31 DDIM steps" in text


def test_memory_counts_both_states_and_equals_state_bytes(lab: Lab) -> None:
    values = table6.measure(lab)
    by = {(row["states"], row["batch"]): row for row in values["rows"]}
    base, half, linear = (by[name, 2] for name in ("hold, float32", "hold, float16", "linear, float32"))
    both = base["input"] + base["output"]
    assert half["input"] + half["output"] == pytest.approx(both / 2)
    assert linear["input"] + linear["output"] == pytest.approx(2 * both)
    assert by["hold, float32", 8]["output"] == pytest.approx(4 * base["output"])
    pipe, held = pixel_pipeline(), []
    apply(pipe, presets.modulated(8, 4))
    pipe.unet.register_forward_hook(lambda model, *_: held.append(state_bytes(model)))
    unconditional_run(pipe, 2, 2, 0)()
    remove(pipe)
    assert both * 2**20 == pytest.approx(held[-1])
    four = next(row for row in values["printed"] if row["bits"] == 4 and row["batch"] == 2)
    assert four["state"] == pytest.approx(base["output"] / 8)  # 4 of 32 bits
    text, _, _ = shown(table6, values)
    eight = by["hold, float32", 8]
    assert f"the states hold {eight['input'] + eight['output']:.1f} MiB" in text


# ------------------------------------------------------------------------------------------------------------ names


def test_every_experiment_has_one_name_and_the_tables_names_are_known() -> None:
    assert tuple(EXPERIMENTS) == experiment_names("all") == experiment_names("")
    assert experiment_names("zero-bits,figure1a") == ("figure1a", "zero-bits")
    assert experiment_names(" table5, table16 ") == ("samplers",)
    names = [n for e in EXPERIMENTS.values() for n in (e.name, *e.also)]
    assert len(set(names)) == len(names)
    for text in ("table3", "figure1a,,nothing", ","):
        with pytest.raises(ConfigError, match="experiments figure1a table4"):
            experiment_names(text)


def test_all_sections_fit_in_one_report(tmp_path: Path) -> None:
    """Names of tables and figures are unique over the study."""
    sections = []
    for module in SAMPLED:
        found, why = module.EXPERIMENT.show(module.measure(FakeLab()))
        sections.append(StudySection(name="x", title="X", printed=module.EXPERIMENT.printed, found=found, why=why,
                                     command="x").section())  # fmt: skip
    assert Document("Study", "Lead.", tuple(sections))


def test_presets_of_the_study_are_valid_configs() -> None:
    for predictor in ("hold", "linear"):
        assert isinstance(zero_bits.silent(predictor), ModiffConfig)
        assert zero_bits.silent(predictor).layer.modulation.predictor == predictor
    assert set(typing.get_args(zero_bits.Unit)) == {"layer", "block", "sample", "token"}
