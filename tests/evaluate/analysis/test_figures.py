"""The figures: drawn from JSON alone, legible pictures, and robust to runs that diverged."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modiff.evaluate.analysis.figures import figures
from modiff.evaluate.analysis.growth import compensated_bound, printed_bound, uncompensated_bound
from modiff.evaluate.analysis.run import Analysis

NAMES = ["layer_errors.png", "error_growth.png", "bit_sweep.png"]


def step(number: int) -> dict[str, object]:
    residual = {"residual_min": -0.1, "residual_max": 0.05}
    return {
        "step": number, "activation_min": -1.0, "activation_max": 2.0, "output_relative_l2": 0.02 * number,
        **(residual if number else dict.fromkeys(residual)),
    }  # fmt: skip


def spread(bound: object, *, compensated: bool) -> dict[str, object]:
    moves = [0.1] * 4
    return {
        "exceeded": 0.0, "printed_exceeded": 0.0,
        "error_low": [0.01] * 4, "error": [0.02] * 4, "error_high": [0.03] * 4,
        "bound": bound(0.04, moves), "printed_bound": printed_bound(0.04, moves, compensated=compensated),
    }  # fmt: skip


def small_analysis() -> Analysis:
    """What analyze returns, in small: two layers and five steps."""
    names = ["down.conv", "up.conv"]
    return {
        "environment": {},
        "settings": {"bits": [8, 4], "config": {"layer": {"weight": {"bits": None}}}},
        "layers": [{"name": n, "call": 0, "steps": [step(i) for i in range(5)]} for n in names],
        "growth": {
            "steps": [1, 2, 3, 4],
            "compensated": spread(compensated_bound, compensated=True),
            "uncompensated": spread(uncompensated_bound, compensated=False),
            "layers": [],
        },
        "sweep": [{"mode": m, "bits": b, "relative_l2": 0.1 / b, "psnr_db": 30.0}
                  for m in ("plain", "modulated", "tuned") for b in (8, 4)],
    }  # fmt: skip


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The figures of small_analysis as its JSON gives it back."""
    folder = tmp_path_factory.mktemp("figures")
    return {path.name: path for path in figures(json.loads(json.dumps(small_analysis())), folder)}


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("L"))


def test_three_pictures_are_drawn_from_json(baseline: dict[str, Path]) -> None:
    assert list(baseline) == NAMES
    assert sorted(path.name for path in baseline["bit_sweep.png"].parent.iterdir()) == sorted(NAMES)
    for path in baseline.values():
        pixels = picture(path)
        assert min(pixels.shape) >= 400
        assert 0.01 < (pixels < 250).mean() < 0.9


def test_a_diverged_run_of_one_layer_leaves_gaps_and_not_errors(baseline: dict[str, Path], tmp_path: Path) -> None:
    analysis = small_analysis()
    analysis["sweep"] = [{**row, "relative_l2": None, "psnr_db": None} for row in analysis["sweep"]]
    analysis["layers"] = analysis["layers"][:1]
    for mode in ("compensated", "uncompensated"):
        growth = analysis["growth"][mode]
        analysis["growth"][mode] = {k: [0.0] * 4 if isinstance(v, list) else v for k, v in growth.items()}
    for path in figures(analysis, tmp_path):
        assert not np.array_equal(picture(path), picture(baseline[path.name]))
