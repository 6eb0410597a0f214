"""The suite end to end: the same seeds for all, the right figures, nothing lost by a stop; real images."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from modiff import presets
from modiff.errors import ConfigError, FormatError
from modiff.evaluate.features.load import load_extractor
from modiff.evaluate.metrics.paired import relative_l2
from modiff.evaluate.pipelines import DrawnImages, PipelineSource
from modiff.evaluate.report.page import markdown
from modiff.evaluate.report.sections import suite_document
from modiff.evaluate.suite import images as module
from modiff.evaluate.suite.images import as_bytes, read_reference, reference_digest
from modiff.evaluate.suite.judge import measurement
from modiff.evaluate.suite.plans import Plan, Preset, plans_of, preset
from modiff.evaluate.suite.run import Row, Suite, run_suite, watched_layers
from modiff.generate.environment import environment
from modiff.generate.shards import Manifest, write_images
from tests.evaluate.fakes import FakeExtractor, FakeSource
from tests.pixels import pixel_pipeline


def test_pixels_are_rounded_to_nearest_clipped_and_those_that_are_not_finite_counted() -> None:
    images = np.array([[0.0, 1.0, 0.5, 1.4 / 255], [-1.0, 2.0, 1.6 / 255, 1.0], [np.nan, np.inf, 1, 0]])
    drawn = as_bytes(DrawnImages(images.reshape(3, 2, 2, 1), 1.5))
    assert drawn.images.reshape(3, 4).tolist() == [[0, 255, 128, 1], [0, 255, 2, 255], [0, 255, 255, 0]]
    assert (drawn.broken, drawn.seconds) == (1, 1.5)


IMAGES = np.arange(12 * 4 * 5 * 3, dtype=np.uint32).reshape(12, 4, 5, 3).astype(np.uint8)


def generated(folder: Path) -> Path:
    manifest = Manifest(model="m", request={}, num_images=12, shape=(4, 5, 3), batch_size=4, shard_size=8)
    for first in (0, 8):
        manifest = manifest.with_shard(write_images(folder, manifest, first, IMAGES[first : first + 8], {}))
    manifest.save(folder)
    return folder


def test_every_kind_gives_all_images_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 5)
    np.savez(tmp_path / "a.npz", labels=np.arange(12), arr_0=IMAGES)
    np.save(tmp_path / "a.npy", IMAGES)
    (tmp_path / "pictures").mkdir()
    for i in reversed(range(12)):
        Image.fromarray(IMAGES[i]).save(tmp_path / "pictures" / f"{i}.png")
    (tmp_path / "pictures" / "labels.txt").write_text("")
    kinds = [tmp_path / "a.npz", tmp_path / "a.npy", tmp_path / "pictures", generated(tmp_path / "generated")]
    for path in kinds:
        batches = list(read_reference(path))
        assert np.array_equal(np.concatenate(batches), IMAGES)
        assert max(map(len, batches)) <= 8
    digests = {reference_digest(path) for path in kinds}
    np.save(tmp_path / "a.npy", IMAGES ^ (np.arange(IMAGES.size).reshape(IMAGES.shape) == IMAGES.size - 1))
    assert len(digests) == 1
    assert reference_digest(tmp_path / "a.npy") not in digests


def test_arrays_that_are_no_images_damaged_files_and_nothing_at_all_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(FormatError, match="got none there"):
            list(read_reference(path))
    for name, array in (("float", IMAGES / 255), ("flat", IMAGES.reshape(12, -1)), ("empty", IMAGES[:0])):
        np.save(tmp_path / f"{name}.npy", array)
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04nothing")
    np.savez(tmp_path / "nothing.npz")
    (tmp_path / "b.png").write_bytes(b"nothing")
    for file in ("float.npy", "flat.npy", "empty.npy", "a.npz", "nothing.npz", "b.png"):
        with pytest.raises(FormatError, match=rf"{file}: expected uint8 images \(N, H, W, C\), got \w+: "):
            list(read_reference(tmp_path / file))
    Image.fromarray(IMAGES[0]).save(tmp_path / "a.png")
    Image.fromarray(IMAGES[0, :2]).save(tmp_path / "b.png")
    with pytest.raises(FormatError, match="expected images of 4 x 5 x 3 like those before, got 2 x 5 x 3"):
        list(read_reference(tmp_path))


CHOSEN = Preset(num_images=10, steps=4, configs=("plain:8:4", "modulated:8:4"))
NAMES = ["full precision", "half the steps", "plain W8A4", "modulated W8A4"]
SPANS = [range(4), range(4, 8), range(8, 10)]


def run(folder: Path, source: Any = None, chosen: Preset = CHOSEN, **options: Any) -> Suite:
    options = {"batch_size": 4, "resamples": 10, "progress": False} | options
    return run_suite(source or FakeSource(), FakeExtractor(), chosen, folder, **options)


def values(row: Row) -> dict[str, float | None]:
    return {m["name"]: m["value"] for m in row.metrics}


def test_every_configuration_gets_the_same_seeds_and_the_figures_of_its_own_images(tmp_path: Path) -> None:
    source = FakeSource()
    suite = run(tmp_path, source)
    assert [row.plan.name for row in suite.rows] == NAMES
    assert source.drawn == SPANS * 4
    full = source.images(None, 4, range(10)).astype(float)
    for row, plan, samples in zip(suite.rows[1:], plans_of(CHOSEN)[1:], suite.samples[1:], strict=True):
        images = source.images(plan.config, plan.steps, range(10))
        assert values(row)["relative_l2"] == pytest.approx(relative_l2(images.astype(float), full))
        assert values(row)["gbops"] == 100 * plan.steps
        assert values(row)["seconds"] == 5.0
        assert np.array_equal(samples, images[:8])


@pytest.mark.parametrize("after", [0, 5, 11])
def test_a_run_stopped_at_any_batch_ends_as_one_that_was_not(after: int, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    stopped, source = FakeSource(stop_after=after), FakeSource()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", stopped)
    resumed = run(tmp_path / "stopped", source)
    assert [*stopped.drawn, *source.drawn] == SPANS * 4
    assert resumed.rows == whole.rows


def test_a_finished_run_is_judged_again_with_a_reference_and_more_images_keep_its_full_batches(tmp_path: Path) -> None:
    first, source = run(tmp_path / "run"), FakeSource()
    np.save(tmp_path / "real.npy", FakeSource(seed=50).images(None, 4, range(12)))
    second = run(tmp_path / "run", source, reference=tmp_path / "real.npy", resamples=11)
    assert source.drawn == []
    assert "fd_to_reference" not in values(first.rows[0])
    assert all(values(row)["fd_to_reference"] > 0 for row in second.rows)
    assert second.rows[1].metric("relative_l2")["low"] != first.rows[1].metric("relative_l2")["low"]
    run(tmp_path / "run", source, dataclasses.replace(CHOSEN, num_images=13))
    assert source.drawn == [range(8, 12), range(12, 13)] * 4


@pytest.mark.parametrize("keep", [0, 10, 300])
def test_a_damaged_batch_is_named_and_says_what_to_do(tmp_path: Path, keep: int) -> None:
    run(tmp_path)
    path = next(tmp_path.rglob("000004-000008.safetensors"))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FormatError, match=r"000004-000008\.safetensors: expected a batch of 4 .* Delete it"):
        run(tmp_path)
    path.write_bytes(path.with_name("000008-000010.safetensors").read_bytes())
    with pytest.raises(FormatError, match="expected a batch of 4 images, got ValueError: 2 images"):
        run(tmp_path)


def test_a_reference_that_does_not_fit_stops_it_before_anything_is_drawn(tmp_path: Path) -> None:
    source = FakeSource()
    for name, count, side, message in (("small", 20, 8, "of 12 x 12 x 1 like those of the model, got 20 of 8 x 8 x 1"),
                                       ("few", 7, 12, r"expected 8 images or more .* got 7 of")):  # fmt: skip
        np.save(tmp_path / f"{name}.npy", np.zeros((count, side, side, 1), np.uint8))
        with pytest.raises(FormatError, match=message):
            run(tmp_path / "run", source, reference=tmp_path / f"{name}.npy")
    assert source.drawn == []


@pytest.mark.parametrize(
    ("chosen", "options", "message"),
    [
        ({"num_images": 7}, {}, "num_images: expected 8 or more, got 7"),
        ({}, {"batch_size": 0}, "batch_size: expected 1 or more, got 0"),
        ({"configs": ("w9a9",)}, {}, "expected None, 0 or 2 to 8, got 9"),
        ({"configs": ("w8a4", "modulated:8:4")}, {}, "different configurations, got 'modulated W8A4 twice'"),
        ({"steps": 1}, {}, "steps: expected 2 or more, got 1"),
    ],
)
def test_settings_that_mean_nothing_are_errors_and_make_no_folder(
    chosen: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "run", chosen=dataclasses.replace(CHOSEN, **chosen), **options)
    assert not (tmp_path / "run").exists()


def test_json_has_every_figure_with_all_its_fields_and_no_infinity(tmp_path: Path) -> None:
    result = json.loads(json.dumps(run(tmp_path).to_dict(["modiff", "evaluate", "my model"]), allow_nan=False))
    assert result["command"] == "modiff evaluate 'my model'"
    assert [c["name"] for c in result["configurations"]] == NAMES
    fields = ["name", "label", "extractor", "value", "n", "low", "high", "note"]
    assert all(list(m) == fields for c in result["configurations"] for m in c["metrics"])
    assert {"cpu", "torch", "modiff"} <= set(result["environment"])
    assert str(tmp_path) not in json.dumps(result)


FULL = Plan(name="full", steps=2)
PLAIN = Plan(name="plain", steps=2, config=presets.plain(8, 4))
MODULATED = Plan(name="modulated", steps=2, config=presets.modulated(8, 4))
ACTIVATION = {"bits": 4, "dynamic": False, "granularity": "tensor"}
STATIC = Plan(name="static", steps=2, config=presets.as_config({"layer": {"activation": ACTIVATION}}))


@pytest.mark.parametrize(
    ("plans", "watched"),
    [([FULL, MODULATED, PLAIN, STATIC], MODULATED), ([FULL, PLAIN, STATIC], PLAIN), ([FULL, STATIC], None)],
)
def test_the_last_modulated_plan_with_dynamic_scales_is_watched(plans: list[Plan], watched: Plan | None) -> None:
    layers = watched_layers(PipelineSource(pixel_pipeline()), plans, 1)
    assert (layers and layers[0]) == watched
    assert layers is None or all(len(trace["steps"]) == 2 for trace in layers[2])


def test_names_and_families_of_plans_tell_them_apart(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(dataclasses.replace(presets.w8a4(), min_weights=7).to_json())
    chosen = preset("quick", configs=("plain:8:4", "w8a4", "modulated:8:4:integer", str(tmp_path / "mine.json")))
    assert (chosen.num_images, chosen.steps) == (500, 50)
    plans = plans_of(chosen)
    assert [(plan.name, plan.steps, plan.family) for plan in plans] == [
        ("full precision", 50, "steps"), ("half the steps", 25, "steps"), ("plain W8A4", 50, "plain"),
        ("modulated W8A4", 50, "modulated"), ("modulated W8A4 on integers", 50, "modulated"), ("mine", 50, "config"),
    ]  # fmt: skip
    assert len({dataclasses.replace(plan, name="a").key for plan in plans}) == len(plans)
    assert plans[0].key == Plan(name="full precision", steps=50).key
    assert Plan(name="../A b/ü", steps=4).key.startswith("a-b-")
    with pytest.raises(ConfigError, match="preset: expected one of quick, full, got 'fast'"):
        preset("fast")


def test_the_table_as_it_is_printed() -> None:
    full = {"gbops": 1234.5, "seconds": 61.26}
    plain = {"gbops": 0.5, "relative_l2": 0.1, "psnr_db": None, "fd_to_full_precision": 0.25, "unknown": 1.0}
    rows = tuple(Row(Plan(name=name, steps=50), tuple(measurement(m, m, None, v, 500, None) for m, v in values.items()))
                 for name, values in (("full precision", full), ("plain", plain)))  # fmt: skip
    text = Suite(rows, (), {"num_images": 500, "extractor": "mine", "extractor_dimension": 8}, environment()).table()
    assert text.splitlines()[:4] == [
        "                steps  FD to full precision  rel. L2  PSNR dB  GBOPs  seconds",
        "-----------------------------------------------------------------------------",
        "full precision     50                     -        -        -   1234     61.3",
        "plain              50                  0.25   0.1000        -    0.5        -",
    ]
    assert "mine features" in text
    assert "500 images: the distance is biased" in text


def test_without_an_extractor_images_are_compared_one_by_one_and_the_report_stands(tmp_path: Path) -> None:
    extractor, chosen = load_extractor(None, channels=3), dataclasses.replace(CHOSEN, num_images=2)
    suite = run_suite(FakeSource(), extractor, chosen, tmp_path, resamples=10, progress=False)
    names = [set(values(row)) for row in suite.rows]
    costs = {"gbops", "state_mib", "seconds"}
    assert names == [costs, *[costs | {"relative_l2", "psnr_db", "ssim"}] * 3]
    assert "FD" not in suite.table().replace("For distances", "")
    assert "one by one" in suite.table()
    report = suite_document(suite, ["modiff"])
    assert [figure.name for figure in report.figures()][-2:] == ["relative-l2-by-gbops", "relative-l2-by-seconds"]
    assert "as-sets" not in markdown(report)
    with pytest.raises(ConfigError, match="reference: expected an extractor with it"):
        run_suite(FakeSource(), extractor, chosen, tmp_path, reference=tmp_path, progress=False)
