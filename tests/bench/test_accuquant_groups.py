"""The study of group sizes: gradients compared with exact ones, figures that are what they say, each size run once."""

import json
import sys
from typing import Any

import pytest

from bench import accuquant_groups as bench
from tests.bench.in_process import run_here
from tests.methods import small

SETTINGS: dict[str, Any] = {
    "steps": 2, "samples": 2, "batch": 2, "iterations": 2, "learning_rate": 0.05,
    "weight_bits": 8, "activation_bits": 4, "num_images": 3, "seed": 0,
}  # fmt: skip


def test_rows_hold_what_the_method_gives_and_each_size_is_run_once(tmp_path, monkeypatch):
    small.build().save_pretrained(tmp_path / "pipeline")
    tasks: list[int] = []
    run_here(monkeypatch, bench, lambda task: tasks.append(task["group_size"]))
    places = {"--model": "pipeline", "--work": "work", "--json": "rows.json", "--page": "docs/project/accuquant.md"}
    arguments = [text for option, name in places.items() for text in (option, str(tmp_path / name))]
    arguments += [text for name, value in SETTINGS.items() for text in (f"--{name.replace('_', '-')}", str(value))]

    def start() -> list[dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", ["accuquant_groups.py", *arguments, "--groups", "1,2"])
        bench.main()
        return json.loads((tmp_path / "rows.json").read_text())["rows"]

    one, two = start()
    assert list(one) == list(bench.FIELDS)
    assert [(row["group_size"], row["groups"]) for row in (one, two)] == [(1, 2), (2, 1)]
    assert one["cosine_lowest"] == pytest.approx(1.0, abs=1e-5), "the gradient of one step is exact"
    assert 0.5 < two["cosine_mean"] == two["cosine_lowest"] < 1 - 1e-6
    for row in (one, two):
        assert 50 < row["loaded_mib"] <= row["peak_mib"] <= row["exact_peak_mib"]
        assert row["peak_ratio"] == pytest.approx(row["peak_mib"] / one["peak_mib"])

    start()
    assert tasks == [1, 2], "kept rows are not run again"
    assert "| 1 | 2 | " in (tmp_path / "docs" / "project" / "accuquant.md").read_text()
