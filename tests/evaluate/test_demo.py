"""The demo on a tiny pipeline: the rows asked for, the same noise in each, and honest figures."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch

import modiff
from modiff.errors import ConfigError
from modiff.evaluate.demo import Demo, run_demo
from modiff.model.tune import candidates
from tests.pixels import pixel_pipeline

STEPS, IMAGES, SEED = 4, 2, 3
FIELDS = [
    "name", "weight_bits", "activation_bits", "modulated", "compensated", "anchor_weights",
    "reanchor_every", "tuned", "steps",
    "relative_l2", "psnr_db", "gbops", "state_mib", "seconds",
]  # fmt: skip


@pytest.fixture(scope="module")
def demo() -> Iterator[Demo]:
    with pytest.MonkeyPatch.context() as patch:
        # a few candidates only: what is tested here is the demo
        patch.setattr("modiff.model.tune.candidates", lambda base: candidates(base)[::4])
        yield run_demo(pixel_pipeline(), steps=STEPS, num_images=IMAGES, seed=SEED, progress=False)


def test_the_rows_are_those_of_the_issue_in_order_and_run_what_their_names_say(demo: Demo) -> None:
    assert [r["name"].replace("modulated", "m").replace("plain", "p") for r in demo.rows] == [
        "full precision", "half the steps", "a quarter of the steps", "p W8A8", "p W8A4", "p W8A3", "m W8A8",
        "m W8A4", "m W8A3", "m W8A2", "m W4A8", "m W8A8, quantized anchor", "m W8A8, anchored every 10",
        "m W4A8, quantized anchor", "m W4A8, anchored every 10", "m W8A4, no compensation", "p W32A4", "m W32A4",
        "m W32A3", "tuned W32A4", "tuned W32A3", "tuned W32A2",
    ]  # fmt: skip
    assert [r["steps"] for r in demo.rows] == [4, 2, 1, *[4] * 19]
    for r in demo.rows[3:]:
        name, modulated = r["name"], not r["name"].startswith("plain")
        assert f" W{r['weight_bits']}A{r['activation_bits']}" in name
        assert (r["modulated"], r["tuned"]) == (modulated, name.startswith("tuned"))
        assert r["compensated"] == (("no compensation" not in name) if modulated else None)
        exact = "quantized" not in name and "no compensation" not in name
        assert r["anchor_weights"] == (("exact" if exact else "quantized") if modulated else None)
        assert r["reanchor_every"] == (10 * name.endswith("every 10") if modulated else None)


def test_the_json_has_exactly_the_fields_agreed_on_and_no_infinity(demo: Demo) -> None:
    values = json.loads(json.dumps(demo.to_dict(), allow_nan=False))
    assert [list(r) for r in values["rows"]] == [FIELDS] * len(demo.rows)
    assert values["environment"]["modiff"] == modiff.__version__
    assert values["settings"]["seed"] == SEED


def test_errors_are_those_of_the_images_against_diffusers_alone(demo: Demo) -> None:
    noise = [torch.Generator().manual_seed(SEED + i) for i in range(IMAGES)]
    reference = pixel_pipeline()(batch_size=IMAGES, num_inference_steps=STEPS, generator=noise, output_type="np").images
    for r, images in zip(demo.rows[1:], demo.images[1:], strict=True):
        difference = images.astype(np.float64) - reference
        # two float64 sums of 128 terms
        expected = np.linalg.norm(difference) / np.linalg.norm(reference.astype(np.float64))
        assert r["relative_l2"] == pytest.approx(expected, rel=1e-12)
        assert r["psnr_db"] == pytest.approx(-10 * np.log10(np.mean(difference**2)), rel=1e-12)
    assert (demo.rows[0]["relative_l2"], demo.rows[0]["psnr_db"]) == (0.0, None)


def test_modulation_and_tuning_pay_also_on_random_weights(demo: Demo) -> None:
    error = {r["name"]: r["relative_l2"] or 0.0 for r in demo.rows}
    assert error["modulated W32A4"] < 0.6 * error["plain W32A4"]
    assert error["tuned W32A4"] < error["modulated W32A4"]
    assert error["modulated W4A8"] < 0.5 * error["modulated W4A8, quantized anchor"]
    assert error["modulated W8A8"] < error["modulated W8A4"] < error["modulated W8A3"] < error["modulated W8A2"]


def test_a_demo_that_cannot_run_says_so_at_once() -> None:
    for name, value, message in (("steps", 3, "4 or more, got 3"), ("steps", 1001, "at most 1000, got 1001"),
                                 ("num_images", 0, "at least 1 image, got 0")):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            run_demo(pixel_pipeline(), **{name: value})
