"""The bars of learned rounding and static scales: rows that are what they say, kept, and judged as written."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import modiff
from bench import reconstruction as bench
from modiff import ConfigError
from modiff.model.attach import attachment_of
from modiff.model.calibrate import quantizers_of
from tests.methods import small

SIZES = {"num_images": 3, "steps": 4, "static_steps": 3, "iterations": 3, "samples": 4, "calibration_steps": 2}
ROWS = [
    "W4A8 nearest, minmax", "W4A8 nearest, mse", "W4A8 learned", "W4A32 learned", "W4A4 plain, learned",
    "W4A4 modulated, learned", "W32A8 calibrate", "W32A8 static_minmax", "W32A8 static_learned",
    "W32A8 calibrate, clip 0.25", "W32A8 calibrate, 10 step groups", "W32A8 calibrate, each step",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a pipeline in it, and everything that one run writes."""
    path = tmp_path_factory.mktemp("bench")
    small.build().save_pretrained(path / "pipeline")
    with pytest.MonkeyPatch.context() as patch:
        start(patch, path)
    return path


def start(monkeypatch: pytest.MonkeyPatch, folder: Path, *more: str) -> dict[str, Any]:
    places = {"--model": "pipeline", "--work": "work", "--json": "rows.json", "--page": "docs/page.md"}
    arguments = [text for option, name in places.items() for text in (option, str(folder / name))]
    arguments += [text for name, value in SIZES.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    monkeypatch.setattr(sys, "argv", ["reconstruction.py", *arguments, *more])
    bench.main()
    return json.loads((folder / "rows.json").read_text())


def opened(folder: Path) -> bench.Bench:
    return bench.Bench(SIZES | {"model": str(folder / "pipeline"), "seed": 0}, folder / "work")


def sampled(pipe: Any, steps: int) -> torch.Tensor:
    noise = [torch.Generator().manual_seed(bench.FIRST_NOISE + i) for i in range(3)]
    images = pipe(batch_size=3, generator=noise, num_inference_steps=steps, output_type="np").images
    return torch.from_numpy(images).double()


def test_each_row_is_the_error_of_final_images_against_full_precision(folder):
    found = {row["name"]: row for row in json.loads((folder / "rows.json").read_text())["rows"]}
    assert list(found) == ROWS
    pipe = small.build()
    exact = sampled(pipe, 4)
    config = modiff.presets.plain(4, 8)
    modiff.apply(pipe, config)
    row = found["W4A8 nearest, minmax"]
    difference = sampled(pipe, 4) - exact
    each = difference.flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert row["relative_l2"] == pytest.approx(float(difference.norm() / exact.norm()), rel=1e-3)
    assert row["worst_image"] == pytest.approx(float(each.max()), rel=1e-3)
    assert row["median_image"] == pytest.approx(float(each.median()), rel=1e-3)
    assert {found[name]["steps"] for name in ROWS[:6]} == {4}
    assert {found[name]["steps"] for name in ROWS[6:]} == {3}
    assert found["W4A8 learned"]["relative_l2"] != found["W4A8 nearest, mse"]["relative_l2"]


def test_learned_rows_share_one_set_of_codes_and_full_precision_comes_back(folder):
    run = opened(folder)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    codes = run.learned()
    assert attachment_of(run.model) is None
    for name in ("W4A8 learned", "W4A32 learned", "W4A4 plain, learned", "W4A4 modulated, learned"):
        run.rows()[name][0]()
        quantized_layers = attachment_of(run.model).layers
        assert quantized_layers.keys() == codes.keys()
        for layer, quantized in quantized_layers.items():
            for (mine, _), (kept, _) in zip(
                quantized.quantized_weight.codes(quantized.weight), codes[layer], strict=True
            ):
                assert torch.equal(mine, kept)
        modiff.remove(run.pipe)
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.state_dict().items())


def test_static_rows_have_float_weights_and_frozen_scales_of_eight_bits(folder):
    run = opened(folder)
    for name in ROWS[6:]:
        run.rows()[name][0]()
        layers = [quantized.config for quantized in attachment_of(run.model).layers.values()]
        assert all(layer.weight.bits is None and layer.modulation is not None for layer in layers)
        quantizers = quantizers_of(run.model).values()
        sets = 2 if "step" in name.partition(",")[2] else 1  # three steps have two residuals
        assert {quantizer.config.clip for quantizer in quantizers} == {0.25 if "clip" in name else 1.0}
        assert all(quantizer.bits == 8 and not quantizer.config.dynamic for quantizer in quantizers)
        assert {1 if quantizer.tables is None else len(quantizer.tables) for quantizer in quantizers} == {sets}
        assert all((quantizer.static is None) == (sets > 1) for quantizer in quantizers)
        modiff.remove(run.pipe)


def test_a_second_run_measures_nothing_and_says_the_same(folder, monkeypatch):
    before = json.loads((folder / "rows.json").read_text())
    monkeypatch.setattr(bench.Bench, "measure", None)
    assert start(monkeypatch, folder) == before
    text = (folder / "docs" / "page.md").read_text()
    assert str(folder) not in text
    assert "| W4A8 learned | 4 | " in text
    with pytest.raises(ConfigError, match="expected a folder of the same job, got one with another "):
        start(monkeypatch, folder, "--seed", "1")


def test_a_row_that_is_missing_is_measured_from_learned_blocks_that_are_kept(folder, monkeypatch):
    before = json.loads((folder / "rows.json").read_text())["rows"]
    (folder / "work" / "row-2.json").unlink()
    monkeypatch.setattr("modiff.calibration.reconstruct.job.Job.learn", None)
    after = start(monkeypatch, folder)["rows"]
    assert after[2]["relative_l2"] == before[2]["relative_l2"]


@pytest.mark.parametrize(("learned", "met"), [(0.65, True), (0.66, False)])
def test_bars_are_ratios_to_the_row_they_name_or_absolute(learned, met):
    found = {name: {"relative_l2": 1.0} for name in ROWS}
    found["W4A8 learned"]["relative_l2"] = learned
    found["W32A8 calibrate"]["relative_l2"] = 0.005
    found["W4A32 learned"]["relative_l2"] = 0.5
    judged = {bar["row"]: (bar["value"], bar["met"]) for bar in bench.judged(found)}
    assert judged[bench.LEARNED] == (learned, met)
    assert [bar["than"] for bar in bench.judged(found)][:2] == ROWS[:2]
    assert judged["W4A4 modulated, learned"] == (2.0, False)
    assert judged["W32A8 calibrate"] == (0.005, True)
    assert judged["W32A8 static_learned"] == (1.0, False)


def test_images_come_from_noise_that_calibration_never_draws(folder):
    run = opened(folder)
    np.testing.assert_allclose(run.images(2), sampled(run.pipe, 2).numpy(), atol=1e-5)
    assert bench.FIRST_NOISE > 10_000
