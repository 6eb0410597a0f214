"""The figures: drawn from JSON alone, legible pictures, and robust to runs that diverged."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modiff.evaluate.analysis.figures import figures
from modiff.evaluate.analysis.run import Analysis, analyze_pipeline
from tests.pixels import pixel_pipeline


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    """As its JSON gives it back."""
    analysed = analyze_pipeline(pixel_pipeline(), steps=3, num_images=1, bits=(8, 4), progress=False)
    return json.loads(json.dumps(analysed))


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("L"))


def test_three_pictures_are_drawn_from_json(analysis: Analysis, tmp_path: Path) -> None:
    paths = figures(analysis, tmp_path)
    assert [path.name for path in paths] == ["layer_errors.png", "error_growth.png", "bit_sweep.png"]
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    for path in paths:
        pixels = picture(path)
        assert min(pixels.shape) >= 400
        assert 0.01 < (pixels < 250).mean() < 0.9


def test_a_diverged_run_of_one_layer_leaves_gaps_and_not_errors(analysis: Analysis, tmp_path: Path) -> None:
    baseline = [picture(path) for path in figures(analysis, tmp_path)]
    diverged = {**analysis, "growth": dict(analysis["growth"]), "layers": analysis["layers"][:1]}
    diverged["sweep"] = [{**row, "relative_l2": None, "psnr_db": None} for row in analysis["sweep"]]
    for mode in ("compensated", "uncompensated"):
        growth = analysis["growth"][mode]
        diverged["growth"][mode] = {k: [0.0] * len(v) if isinstance(v, list) else v for k, v in growth.items()}
    for path, before in zip(figures(diverged, tmp_path), baseline, strict=True):
        assert not np.array_equal(picture(path), before)
