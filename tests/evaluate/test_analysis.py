"""The whole analysis on a tiny pipeline: what it holds, its figures, and what it refuses."""

import json
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import modiff
from modiff import presets
from modiff.config import LayerConfig, ModiffConfig, QuantizerConfig, WeightConfig
from modiff.errors import ConfigError, StateError
from modiff.evaluate.analysis import figures as drawn
from modiff.evaluate.analysis.figures import figures
from modiff.evaluate.analysis.run import SWEEP_MODES, analyze_pipeline, bit_sweep
from modiff.evaluate.pipelines import PipelineSource, image_error
from modiff.generate.samplers import set_scheduler
from tests.drawings import undrawn, whole_ticks
from tests.helpers import Terminal
from tests.pixels import pixel_pipeline


def test_it_is_plain_json_with_the_documented_fields_and_fills_its_bar() -> None:
    with redirect_stderr(Terminal()) as shown:
        analysis = analyze_pipeline(set_scheduler(pixel_pipeline(), "heun"), steps=2, num_images=2, seed=5, bits=(8, 3))
    assert "bit widths: 100%" in shown.getvalue()
    assert json.loads(json.dumps(analysis, allow_nan=False)) == analysis
    assert set(analysis) == {"environment", "settings", "layers", "growth", "sweep", "outliers"}
    assert set(analysis["layers"][0]) == {"name", "kind", "call", "setting", "steps"}
    assert len(analysis["layers"][0]["steps"]) == 3  # Heun's last step has one evaluation
    assert {(row["mode"], row["bits"]) for row in analysis["sweep"]} == {(m, b) for m in SWEEP_MODES for b in (8, 3)}
    assert analysis["growth"]["steps"] == [1, 2]
    expected = {"steps": 2, "num_images": 2, "seed": 5, "bits": [8, 3], "config": presets.modulated(None, 4).to_dict()}
    assert {key: analysis["settings"][key] for key in expected} == expected


def test_a_mistake_is_refused_in_one_line_and_leaves_the_pipeline_plain() -> None:
    pipe, static = pixel_pipeline(), LayerConfig(activation=QuantizerConfig(dynamic=False, granularity="tensor"))
    for settings, message in (
        ({"steps": 1}, "expected 2 or more, got 1"),
        ({"num_images": 0}, "expected at least 1 image, got 0"),
        ({"config": ModiffConfig(overrides=(("*conv1", static),))}, "expected dynamic scales"),
        ({"config": presets.modulated(8, None)}, "expected a layer that codes its input"),
    ):
        with pytest.raises(ConfigError, match=message):
            analyze_pipeline(pipe, **{"steps": 2, "num_images": 1, "progress": False, **settings})
        assert sum(len(m._forward_hooks) for m in pipe.unet.modules()) == 0


def test_a_model_that_diverges_in_full_precision_is_refused_as_there_is_nothing_to_compare_with() -> None:
    pipe = pixel_pipeline()
    pipe.unet.conv_in.weight.data *= 1e38
    with pytest.raises(StateError, match="expected finite pixels, got NaN or infinity"):
        analyze_pipeline(pipe, steps=2, num_images=1, bits=(8,), progress=False)


def test_rows_equal_runs_by_hand_and_keep_the_configs_weights_and_selection() -> None:
    source = PipelineSource(pixel_pipeline())
    reference = source.draw(3, range(1)).astype(np.float64)
    config = ModiffConfig(layer=LayerConfig(weight=WeightConfig(bits=6)), include=("down_blocks.*",))
    rows = bit_sweep(source, reference, config, 3, (8, 3), ("plain", "tuned"))
    assert [(row["mode"], row["bits"]) for row in rows] == [("plain", 8), ("plain", 3), ("tuned", 8), ("tuned", 3)]
    for row in rows:
        layer = {"plain": presets.plain, "tuned": presets.tuned}[row["mode"]](6, row["bits"]).layer
        modiff.apply(source.pipe, ModiffConfig(layer=layer, include=("down_blocks.*",)))
        difference = source.draw(3, range(1)) - reference
        modiff.remove(source.pipe)
        assert row["relative_l2"] == pytest.approx(np.linalg.norm(difference) / np.linalg.norm(reference), rel=1e-9)
        assert row["psnr_db"] == pytest.approx(-10 * np.log10(np.mean(difference**2)), rel=1e-9)


def test_images_that_are_not_finite_or_equal_have_no_figures_that_json_cannot_hold() -> None:
    reference = np.full((1, 2, 2, 1), 0.5)
    assert image_error(np.full_like(reference, np.nan), reference) == {"relative_l2": None, "psnr_db": None}
    assert image_error(reference, reference) == {"relative_l2": 0.0, "psnr_db": None}


def test_each_figure_has_whole_steps_plain_numbers_and_draws_all_that_it_names(monkeypatch) -> None:
    analysis = analyze_pipeline(pixel_pipeline(), steps=4, num_images=1, bits=(8, 4), progress=False)
    analysis["growth"]["uncompensated"]["printed_bound"] = [1e300] * 3  # far outside
    drawings = [Figure(layout="constrained") for _ in range(3)]
    left = iter(drawings)
    monkeypatch.setattr(drawn, "file_bytes", lambda draw, kind: (draw(next(left)), b"")[1])
    monkeypatch.setattr(drawn, "write_atomically", lambda *_: None)
    figures(analysis, Path())
    maps, growth, (sweep,) = (drawing.axes for drawing in drawings)
    assert all(whole_ticks(axis) for axis in (*maps[:2], *growth, sweep))
    assert [undrawn(axis) for axis in (*growth, sweep)] == [[], [], []]
    assert [axis.get_legend().get_texts()[-1].get_text() for axis in growth] == [
        "bound (triangle inequality)", "as printed in Thm 4.4"]  # fmt: skip
    for drawing in drawings:
        drawing.draw_without_rendering()
    for axis in (growth[0], sweep, maps[2]):  # maps[2]: the bar of errors
        labels = [float(label.get_text()) for label in axis.get_yticklabels() if label.get_text()]
        assert min(labels) > 0  # errors, neither powers nor logarithms


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("L"))


def test_three_pictures_are_drawn_from_json_also_of_a_run_of_one_layer_that_diverged(tmp_path: Path) -> None:
    analysis = analyze_pipeline(pixel_pipeline(), steps=3, num_images=1, bits=(8, 4), progress=False)
    paths = figures(json.loads(json.dumps(analysis)), tmp_path)
    assert [path.name for path in paths] == ["layer_errors.png", "error_growth.png", "bit_sweep.png"]
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    pictures = [picture(path) for path in paths]
    for pixels in pictures:
        assert min(pixels.shape) >= 400
        assert 0.01 < (pixels < 250).mean() < 0.9
    analysis["layers"] = analysis["layers"][:1]
    analysis["sweep"] = [{**row, "relative_l2": None, "psnr_db": None} for row in analysis["sweep"]]
    for mode in ("compensated", "uncompensated"):
        growth = analysis["growth"][mode]
        analysis["growth"][mode] = {k: [0.0] * len(v) if isinstance(v, list) else v for k, v in growth.items()}
    for path, before in zip(figures(analysis, tmp_path), pictures, strict=True):
        assert not np.array_equal(picture(path), before)
