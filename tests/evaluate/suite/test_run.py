"""The suite end to end: the same seeds for all, figures of the right images, nothing lost or done twice by a stop."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modiff import presets
from modiff.config import ModiffConfig
from modiff.errors import ConfigError, FormatError
from modiff.evaluate.features.classifier import Classifier, ClassifierFeatures
from modiff.evaluate.metrics.paired import relative_l2
from modiff.evaluate.suite.images import PipelineSource
from modiff.evaluate.suite.judge import Measurement
from modiff.evaluate.suite.plans import Plan, Preset, plans_of
from modiff.evaluate.suite.run import Row, Suite, run_suite, watched_layers
from modiff.generate.environment import environment
from tests.evaluate.suite.fakes import FakeExtractor, FakeSource
from tests.pixels import pixel_pipeline

CHOSEN = Preset(num_images=10, steps=4, configs=("plain:8:4", "modulated:8:4"))
NAMES = ["full precision", "half the steps", "plain W8A4", "modulated W8A4"]


def run(folder: Path, source: Any = None, chosen: Preset = CHOSEN, **options: Any) -> Suite:
    options = {"batch_size": 4, "resamples": 10, "progress": False} | options
    return run_suite(source or FakeSource(), FakeExtractor(), chosen, folder, **options)


def values(row: Row) -> dict[str, float | None]:
    return {m["name"]: m["value"] for m in row.metrics}


def test_every_configuration_gets_the_same_seeds_and_the_figures_of_its_own_images(tmp_path: Path) -> None:
    source = FakeSource()
    suite = run(tmp_path, source)
    assert [row.plan.name for row in suite.rows] == NAMES
    spans = [range(4), range(4, 8), range(8, 10)]
    assert source.drawn == [(name, span) for name in NAMES for span in spans]
    plans = plans_of(CHOSEN)
    full = source.images(plans[0], range(10)).astype(float)
    for row, plan, samples in zip(suite.rows[1:], plans[1:], suite.samples[1:], strict=True):
        images = source.images(plan, range(10))
        assert values(row)["relative_l2"] == pytest.approx(relative_l2(images.astype(float), full))
        assert values(row)["gbops"] == 100 * plan.steps
        assert values(row)["seconds"] == 5.0
        assert np.array_equal(samples, images[:8])


@pytest.mark.parametrize("after", [0, 1, 5, 11])
def test_a_run_stopped_at_any_batch_ends_as_one_that_was_not(after: int, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    stopped = FakeSource(stop_after=after)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", stopped)
    source = FakeSource()
    resumed = run(tmp_path / "stopped", source)
    assert [*stopped.drawn, *source.drawn] == [(n, s) for n in NAMES for s in (range(4), range(4, 8), range(8, 10))]
    assert resumed.rows == whole.rows


def test_a_finished_run_is_judged_again_with_a_reference_or_other_resamples(tmp_path: Path) -> None:
    first = run(tmp_path / "run")
    np.save(tmp_path / "real.npy", FakeSource(seed=50).images(plans_of(CHOSEN)[0], range(12)))
    source = FakeSource()
    second = run(tmp_path / "run", source, reference=tmp_path / "real.npy", resamples=11)
    assert source.drawn == []
    assert "fd_to_reference" not in values(first.rows[0])
    assert all(values(row)["fd_to_reference"] > 0 for row in second.rows)
    assert second.rows[1].metric("relative_l2")["low"] != first.rows[1].metric("relative_l2")["low"]


def test_a_reference_that_does_not_fit_stops_it_before_anything_is_drawn(tmp_path: Path) -> None:
    source = FakeSource()
    np.save(tmp_path / "small.npy", np.zeros((20, 8, 8, 1), np.uint8))
    with pytest.raises(FormatError, match="of 12 x 12 x 1 like those of the model, got 20 of 8 x 8 x 1"):
        run(tmp_path / "run", source, reference=tmp_path / "small.npy")
    np.save(tmp_path / "few.npy", np.zeros((7, 12, 12, 1), np.uint8))
    with pytest.raises(FormatError, match=r"expected 8 images or more .* got 7 of"):
        run(tmp_path / "run", source, reference=tmp_path / "few.npy")
    assert source.drawn == []


@pytest.mark.parametrize(
    ("chosen", "options", "message"),
    [
        (Preset(num_images=7, steps=4, configs=()), {}, "--num-images: expected 8 or more, got 7"),
        (CHOSEN, {"batch_size": 0}, "--batch-size: expected 1 or more, got 0"),
        (Preset(num_images=8, steps=4, configs=("w9a9",)), {}, "'w9a9'"),
    ],
)
def test_settings_that_mean_nothing_are_errors_and_make_no_folder(
    chosen: Preset, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "run", chosen=chosen, **options)
    assert not (tmp_path / "run").exists()


def test_json_has_every_figure_with_all_its_fields_and_no_infinity(tmp_path: Path) -> None:
    result = json.loads(json.dumps(run(tmp_path).to_dict(["modiff", "evaluate", "my model"]), allow_nan=False))
    assert result["command"] == "modiff evaluate 'my model'"
    assert [c["name"] for c in result["configurations"]] == NAMES
    assert result["configurations"][2]["config"]["layer"]["activation"]["bits"] == 4
    fields = ["name", "label", "extractor", "value", "n", "low", "high", "note"]
    assert all(list(m) == fields for c in result["configurations"] for m in c["metrics"])
    assert result["settings"]["num_images"] == 10
    assert {"cpu", "torch", "modiff"} <= set(result["environment"])
    assert str(tmp_path) not in json.dumps(result)


def test_a_real_pipeline_ends_with_small_errors_for_modulation_and_larger_for_fewer_steps(tmp_path: Path) -> None:
    extractor = ClassifierFeatures(Classifier(channels=(4, 8), classes=3), "tiny")
    suite = run_suite(
        PipelineSource(pixel_pipeline()), extractor, CHOSEN, tmp_path, batch_size=5, resamples=10, progress=False
    )
    error = {row.plan.name: values(row)["relative_l2"] for row in suite.rows[1:]}
    assert error["modulated W8A4"] < error["plain W8A4"] < error["half the steps"]
    assert values(suite.rows[3])["state_mib"] > 0 == values(suite.rows[2])["state_mib"]
    assert values(suite.rows[1])["gbops"] * 2 == values(suite.rows[0])["gbops"]


def static(config: ModiffConfig) -> ModiffConfig:
    activation = dataclasses.replace(config.layer.activation, dynamic=False, granularity="tensor")
    return dataclasses.replace(config, layer=dataclasses.replace(config.layer, activation=activation))


FULL = Plan(name="full", steps=4)
PLAIN = Plan(name="plain", steps=4, config=presets.plain(8, 4))
MODULATED = Plan(name="modulated", steps=4, config=presets.modulated(8, 4))
STATIC = Plan(name="static", steps=4, config=static(presets.modulated(8, 4)))


@pytest.mark.parametrize(
    ("plans", "watched"),
    [([FULL, MODULATED, PLAIN, STATIC], MODULATED), ([FULL, PLAIN, STATIC], PLAIN), ([FULL, STATIC], None)],
)
def test_the_last_modulated_configuration_with_dynamic_scales_is_watched(
    plans: list[Plan], watched: Plan | None
) -> None:
    layers = watched_layers(PipelineSource(pixel_pipeline()), plans, 1)
    assert (layers and layers[0]) == watched
    assert layers is None or all(len(trace["steps"]) == 4 for trace in layers[2])


def measured(name: str, value: float | None, n: int = 500) -> Measurement:
    return {"name": name, "label": name, "extractor": None, "value": value, "n": n, "low": None, "high": None,
            "note": ""}  # fmt: skip


def test_the_table_as_it_is_printed() -> None:
    full = [measured("gbops", 1234.5, 1), measured("seconds", 61.26)]
    plain = [measured("gbops", 0.5, 1), measured("relative_l2", 0.1), measured("psnr_db", None),
             measured("fd_to_full_precision", 0.25), measured("unknown", 1.0)]  # fmt: skip
    rows = tuple(Row(Plan(name=n, steps=50), tuple(m)) for n, m in (("full precision", full), ("plain", plain)))
    text = Suite(rows, (), {"num_images": 500, "extractor": "mine", "extractor_dimension": 8}, environment()).table()
    assert text.splitlines()[:4] == [
        "                steps  FD to full precision  rel. L2  PSNR dB  GBOPs  seconds",
        "-----------------------------------------------------------------------------",
        "full precision     50                     -        -        -   1234     61.3",
        "plain              50                  0.25   0.1000        -    0.5        -",
    ]
    assert "mine features" in text
    assert "all 500 images" in text
    assert "500 images: the distance is biased" in text
