"""The sweeps: each row equals a run by hand, and the pipeline is as before."""

import numpy as np
import pytest
from diffusers import DDIMPipeline

import modiff
from modiff import presets
from modiff.config import LayerConfig, ModiffConfig, WeightConfig
from modiff.evaluate.analysis.sweep import bit_sweep, image_error, reuse_sweep
from modiff.hosts.diffusers.runs import unconditional_run
from tests.hosts.tiny import HOSTS

EXACT = ModiffConfig(layer=LayerConfig(weight=WeightConfig(bits=None)))


@pytest.fixture(scope="module")
def pipe() -> DDIMPipeline:
    pipe = HOSTS["ddim"].build()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def relative(found: np.ndarray, reference: np.ndarray) -> float:
    return float(
        ((found.astype(np.float64) - reference) ** 2).sum() ** 0.5 / (reference.astype(np.float64) ** 2).sum() ** 0.5
    )


def test_rows_equal_runs_by_hand_and_keep_the_configs_weights_and_selection(pipe: DDIMPipeline) -> None:
    run = unconditional_run(pipe, 3, 1, 0)
    reference = run().images
    config = ModiffConfig(layer=LayerConfig(weight=WeightConfig(bits=6)), include=("down_blocks.*",))
    rows = bit_sweep(pipe, run, reference, config, (8, 3), ("plain", "tuned"))
    assert [(row["mode"], row["bits"]) for row in rows] == [("plain", 8), ("plain", 3), ("tuned", 8), ("tuned", 3)]
    for row in rows:
        layer = {"plain": presets.plain, "tuned": presets.tuned}[row["mode"]](6, row["bits"]).layer
        modiff.apply(pipe, ModiffConfig(layer=layer, include=("down_blocks.*",)))
        found = run().images
        modiff.remove(pipe)
        assert row["relative_l2"] == pytest.approx(relative(found, reference), rel=1e-9)
        assert row["psnr_db"] == pytest.approx(
            -10 * np.log10(np.mean((found.astype(np.float64) - reference) ** 2)), rel=1e-9
        )


def test_reuse_at_interval_1_is_exact_and_longer_intervals_lose_more(pipe: DDIMPipeline) -> None:
    run = unconditional_run(pipe, 6, 1, 0)
    rows = reuse_sweep(pipe, run, run().images, EXACT, (1, 2, 4))
    assert [row["interval"] for row in rows] == [1, 2, 4]
    errors = [row["relative_l2"] for row in rows]
    assert errors[0] < 1e-6
    assert 1e-4 < errors[1] < errors[2]


def test_images_that_are_not_finite_or_equal_have_no_figures_that_json_cannot_hold() -> None:
    reference = np.full((1, 2, 2, 1), 0.5)
    assert image_error(np.full_like(reference, np.nan), reference) == {"relative_l2": None, "psnr_db": None}
    assert image_error(reference, reference) == {"relative_l2": 0.0, "psnr_db": None}
