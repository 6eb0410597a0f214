"""The bars of learned rounding and static scales: rows that are what they say, kept, and judged as written."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import modiff
from bench import reconstruction as bench
from tests.methods import small

SIZES = {"num_images": 3, "steps": 4, "static_steps": 3, "iterations": 3, "samples": 4, "calibration_steps": 2}
ROWS = [
    "W4A8 nearest, minmax", "W4A8 nearest, mse", "W4A8 learned", "W4A32 learned", "W4A4 plain, learned",
    "W4A4 modulated, learned", "W32A8 calibrate", "W32A8 static_minmax", "W32A8 static_learned",
    "W32A8 calibrate, clip 0.25", "W32A8 calibrate, 10 step groups", "W32A8 calibrate, each step",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a pipeline in it, and everything that one run writes."""
    path = tmp_path_factory.mktemp("bench")
    small.build().save_pretrained(path / "pipeline")
    with pytest.MonkeyPatch.context() as patch:
        start(patch, path)
    return path


def start(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[dict[str, Any]]:
    places = {"--model": "pipeline", "--work": "work", "--json": "rows.json", "--page": "docs/page.md"}
    arguments = [text for option, name in places.items() for text in (option, str(folder / name))]
    arguments += [text for name, value in SIZES.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    monkeypatch.setattr(sys, "argv", ["reconstruction.py", *arguments])
    bench.main()
    return json.loads((folder / "rows.json").read_text())["rows"]


def sampled(pipe: Any) -> torch.Tensor:
    noise = [torch.Generator().manual_seed(bench.FIRST_NOISE + i) for i in range(3)]
    images = pipe(batch_size=3, generator=noise, num_inference_steps=4, output_type="np").images
    return torch.from_numpy(images).double()


def test_each_row_is_the_error_of_final_images_against_full_precision(folder):
    found = {row["name"]: row for row in json.loads((folder / "rows.json").read_text())["rows"]}
    assert list(found) == ROWS
    assert [row["steps"] for row in found.values()] == [4] * 6 + [3] * 6
    pipe, row = small.build(), found["W4A8 nearest, minmax"]
    exact = sampled(pipe)
    modiff.apply(pipe, modiff.presets.plain(4, 8))
    difference = sampled(pipe) - exact
    each = difference.flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert row["relative_l2"] == pytest.approx(float(difference.norm() / exact.norm()), rel=1e-3)
    assert row["worst_image"] == pytest.approx(float(each.max()), rel=1e-3)
    assert row["median_image"] == pytest.approx(float(each.median()), rel=1e-3)
    assert bench.FIRST_NOISE > 10_000, "noise that calibration never draws"


@pytest.mark.parametrize(("learned", "met"), [(0.65, True), (0.66, False)])
def test_bars_are_ratios_to_the_row_they_name_or_absolute(learned, met):
    errors = dict.fromkeys(ROWS, 1.0) | {"W4A8 learned": learned, "W32A8 calibrate": 0.005, "W4A32 learned": 0.5}
    bars = bench.judged({name: {"relative_l2": error} for name, error in errors.items()})
    judged = {bar["row"]: (bar["value"], bar["met"]) for bar in bars}
    assert judged[bench.LEARNED] == (learned, met)
    assert judged["W4A4 modulated, learned"] == (2.0, False)
    assert judged["W32A8 calibrate"] == (0.005, True)
    assert judged["W32A8 static_learned"] == (1.0, False)
