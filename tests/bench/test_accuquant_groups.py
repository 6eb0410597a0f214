"""The study of group sizes: gradients compared with exact ones, figures that are what they say, each size run once."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import accuquant_groups as bench
from modiff import ConfigError
from modiff.methods import quantize
from tests.bench.in_process import run_here
from tests.methods import small

SETTINGS: dict[str, Any] = {
    "model": "pipeline", "steps": 2, "samples": 2, "batch": 2, "iterations": 2, "learning_rate": 0.05,
    "weight_bits": 8, "activation_bits": 4, "num_images": 3, "seed": 0,
}  # fmt: skip


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes run in this process, and are noted."""
    seen: list[int] = []
    run_here(monkeypatch, bench, lambda task: seen.append(task["group_size"]))
    return seen


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small.build().save_pretrained(tmp_path / "pipeline")
    return tmp_path


def start(monkeypatch: pytest.MonkeyPatch, folder: Path, *more: str) -> dict[str, Any]:
    places = {"--model": "pipeline", "--work": "work", "--json": "rows.json", "--page": "docs/accuquant.md"}
    arguments = [text for option, name in places.items() for text in (option, str(folder / name))]
    for name, value in SETTINGS.items():
        arguments += [] if name == "model" else [f"--{name.replace('_', '-')}", str(value)]
    monkeypatch.setattr(sys, "argv", ["accuquant_groups.py", *arguments, *more])
    bench.main()
    return json.loads((folder / "rows.json").read_text())


def test_rows_hold_what_the_method_gives_and_each_size_is_run_once(folder, tasks, monkeypatch):
    found = start(monkeypatch, folder, "--groups", "1,2")
    assert tasks == [1, 2]
    one, two = found["rows"]
    assert list(one) == list(bench.FIELDS)
    assert [(row["group_size"], row["groups"]) for row in (one, two)] == [(1, 2), (2, 1)]
    assert one["cosine_lowest"] == pytest.approx(1.0, abs=1e-5), "the gradient of one step is exact"
    assert two["cosine_mean"] == two["cosine_lowest"] < 1 - 1e-6
    assert two["cosine_lowest"] > 0.5
    for row in (one, two):
        assert row["loaded_mib"] <= row["peak_mib"] <= row["exact_peak_mib"]
        assert row["peak_ratio"] == pytest.approx(row["peak_mib"] / one["peak_mib"])
        assert row["seconds"] > 0

    pipe = small.build()
    noise = [torch.Generator().manual_seed(bench.FIRST_NOISE + i) for i in range(3)]

    def sampled() -> torch.Tensor:
        images = pipe(batch_size=3, generator=noise, num_inference_steps=2, output_type="np").images
        for i, generator in enumerate(noise):
            generator.manual_seed(bench.FIRST_NOISE + i)
        return torch.from_numpy(images).double()

    exact = sampled()
    report = quantize(pipe, bench.config_of(2, SETTINGS), progress=False)
    assert two["relative_l2"] == pytest.approx(float((sampled() - exact).norm() / exact.norm()), rel=1e-3)
    assert two["error_kept"] == pytest.approx(report.scales.units[0].after / report.scales.units[0].before, rel=1e-3)

    start(monkeypatch, folder, "--groups", "1,2")
    assert tasks == [1, 2], "kept rows are not run again"
    text = (folder / "docs" / "accuquant.md").read_text()
    assert "| 1 | 2 | " in text
    assert "| 2 | 1 | " in text
    assert str(folder) not in text
    assert "Bar:" not in text, "a bar that was not measured is not judged"
    with pytest.raises(ConfigError, match="expected a folder of the same job, got one with another "):
        start(monkeypatch, folder, "--seed", "1")


@pytest.mark.parametrize(("ratio", "word"), [(1.15, "Met"), (1.151, "Missed")])
def test_the_bar_is_judged_by_the_ratio_at_eight(ratio, word):
    rows = [{"group_size": 1, "peak_ratio": 1.0}, {"group_size": 8, "peak_ratio": ratio}]
    assert f" that of 1. {word}." in bench.judged(rows)
    assert bench.judged(rows[:1]) == ""


def test_without_a_group_of_one_there_is_no_ratio(tmp_path, monkeypatch):
    row = {"group_size": 8} | dict.fromkeys(bench.FIELDS[1:], 2.0)
    (tmp_path / "group-8.json").write_text(json.dumps(row))
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS))
    (found,) = bench.run_all([8], SETTINGS, tmp_path)
    assert found["peak_ratio"] is None
    assert "| 2 | - | 2 |" in bench.page([found], SETTINGS | {"model": "m"}, "c")


def test_a_cosine_is_that_of_all_pieces_together():
    mine, true = [torch.tensor([1.0, 0.0]), torch.tensor([[2.0]])], [torch.tensor([0.0, 3.0]), torch.tensor([[4.0]])]
    assert bench.cosine(mine, true) == pytest.approx(8 / (5**0.5 * 5))
    assert bench.cosine(mine, [-2 * piece for piece in mine]) == pytest.approx(-1)


@pytest.mark.parametrize("text", ["0", "1,x", ""])
def test_sizes_that_are_none_are_refused(text, folder, tasks, monkeypatch):
    with pytest.raises(ConfigError, match="--groups: expected numbers of 1 or more between commas"):
        start(monkeypatch, folder, "--groups", text)
    assert tasks == []


def test_a_process_tells_its_peak_and_images_come_from_noise_of_their_own():
    assert bench.peak_mib() > 50
    pipe = small.build()
    whole = bench.images_of(pipe, SETTINGS)
    one = bench.images_of(pipe, SETTINGS | {"num_images": 1})
    assert whole.shape == (3, 8, 8, 3)
    np.testing.assert_allclose(one[0], whole[0], atol=1e-4)
