"""Outcomes: the figures are those of the metrics on all images together, and JSON can hold them."""

import json

import numpy as np
import pytest

from experiments.runs import Run, compare, errors_of
from experiments.skipping import SkipRule
from modiff import presets
from modiff.evaluate.metrics.paired import psnr, relative_l2


def pictures(seed: int, count: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).random((count, 4, 4, 3)).astype(np.float32)


def test_errors_are_those_of_all_pixels_together_with_the_median_over_images() -> None:
    images, reference = pictures(0), pictures(1)
    found = errors_of(compare(images, reference, 5, 2.5))
    assert found["relative_l2"] == pytest.approx(relative_l2(images, reference), rel=1e-9)
    assert found["psnr_db"] == pytest.approx(psnr(images, reference), rel=1e-9)
    each = [relative_l2(a, b) for a, b in zip(images, reference, strict=True)]
    assert found["median"] == pytest.approx(float(np.median(each)), rel=1e-9)
    assert min(each) <= found["low"] < found["relative_l2"] < found["high"] <= max(each)


def test_the_outcome_is_json_and_keeps_what_it_cost() -> None:
    outcome = compare(pictures(0), pictures(1), 5, None)
    assert json.loads(json.dumps(outcome, allow_nan=False)) == outcome
    assert (outcome["evaluations"], outcome["gbops"], outcome["pixels"]) == (5, None, 48)
    assert errors_of(json.loads(json.dumps(outcome))) == errors_of(outcome)


def test_equal_images_have_error_0_and_no_psnr_and_diverged_or_black_ones_no_figures() -> None:
    images = pictures(0)
    equal = errors_of(compare(images, images, 1, None))
    assert (equal["relative_l2"], equal["low"], equal["high"], equal["psnr_db"]) == (0.0, 0.0, 0.0, None)
    broken = images.copy()
    broken[2, 0, 0, 0] = np.inf
    nothing = dict.fromkeys(("relative_l2", "low", "high", "median", "psnr_db"))
    assert errors_of(compare(broken, images, 1, None)) == nothing
    assert errors_of(compare(images, np.zeros_like(images), 1, None)) == nothing


def test_one_black_reference_among_others_is_no_obstacle() -> None:
    images, reference = pictures(0), pictures(1)
    reference[0] = 0
    assert errors_of(compare(images, reference, 1, None))["high"] > 0


def test_keys_tell_runs_apart_and_the_reference_is_full_precision() -> None:
    runs = [
        Run(steps=5),
        Run(steps=6),
        Run(steps=5, sampler="ddpm"),
        Run(steps=5, spacing="trailing"),
        Run(steps=5, config=presets.modulated(8, 4)),
        Run(steps=5, config=presets.modulated(8, 3)),
        Run(steps=5, config=presets.plain(8, 4)),
        Run(steps=5, config=presets.plain(8, 4), exact_first=True),
        Run(steps=5, config=presets.modulated(8, 4), skip=SkipRule(unit="layer", threshold=0.1)),
        Run(steps=5, config=presets.modulated(8, 4), skip=SkipRule(unit="layer", threshold=0.2)),
    ]
    assert len({run.key for run in runs}) == len(runs)
    assert Run.from_dict(runs[-1].to_dict()).key == runs[-1].key
    assert runs[-1].reference == Run(steps=5)
    assert Run(steps=5, sampler="pndm", spacing="trailing", config=presets.plain()).reference == Run(
        steps=5, sampler="pndm", spacing="trailing"
    )
