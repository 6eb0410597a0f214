"""The figures of a configuration: equal to their metrics called by hand, named and labelled, with honest notes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from modiff.evaluate.features.extractor import Features
from modiff.evaluate.features.inception import Inception
from modiff.evaluate.metrics.frechet import Moments, frechet_distance, frechet_interval
from modiff.evaluate.metrics.sets import kernel_distance, within_manifold
from modiff.evaluate.pipelines import DrawnImages
from modiff.evaluate.suite import judge as module
from modiff.evaluate.suite.judge import ImageSet, Judge, Measurement, gather, gather_real
from tests.evaluate.suite.fakes import FakeExtractor

N, RESAMPLES = 24, 20
EXTRACTOR = FakeExtractor()


def batches(seed: int, *, noise: float = 0.0, broken: int = 0) -> list[tuple[DrawnImages, Features]]:
    """Images of one seed, with as much noise added; in batches of 10, 10 and 4."""
    images = np.random.default_rng(seed).integers(30, 220, (N, 12, 12, 1)).astype(np.float64)
    images = (images + noise * np.random.default_rng(99).standard_normal(images.shape)).clip(0, 255).astype(np.uint8)
    return [
        (DrawnImages(batch, 0.5 * len(batch), 2**20 * len(batch), broken, 42.0), EXTRACTOR(torch.from_numpy(batch)))
        for batch in np.split(images, [10, 20])
    ]


FULL = gather(batches(0))
DRAWN = gather(batches(0, noise=12.0))
REAL = gather_real([drawn.images for drawn, _ in batches(5)], EXTRACTOR)
ROWS = Judge(EXTRACTOR, FULL, REAL, RESAMPLES).measure(DRAWN)


def row(name: str, rows: list[Measurement] = ROWS) -> Measurement:
    return next(r for r in rows if r["name"] == name)


def test_distances_of_sets_are_those_of_the_metrics() -> None:
    for name, other in (("full_precision", FULL), ("reference", REAL)):
        expected = frechet_distance(Moments.of(DRAWN.pooled), Moments.of(other.pooled))
        assert row(f"fd_to_{name}")["value"] == pytest.approx(expected)
        spatial = other.spatial if other is REAL else Moments.of(other.spatial)
        expected = frechet_distance(Moments.of(DRAWN.spatial), spatial)
        assert row(f"spatial_fd_to_{name}")["value"] == pytest.approx(expected)
        kernel = kernel_distance(DRAWN.pooled, other.pooled, subsets=100, subset_size=N // 2)
        assert row(f"kernel_distance_to_{name}")["value"] == pytest.approx(kernel[0])
        assert row(f"precision_to_{name}")["value"] == within_manifold(DRAWN.pooled, other.pooled).double().mean()
        assert row(f"recall_to_{name}")["value"] == within_manifold(other.pooled, DRAWN.pooled).double().mean()


def test_every_interval_holds_its_figure_and_has_a_width() -> None:
    with_interval = [r for r in ROWS if r["low"] is not None]
    assert {r["name"] for r in with_interval} == {
        "score", "relative_l2", "psnr_db", "ssim",
        *(f"{m}_to_{a}" for m in ("fd", "spatial_fd", "kernel_distance", "precision", "recall")
          for a in ("full_precision", "reference")),
    }  # fmt: skip
    for r in with_interval:
        assert r["low"] <= r["value"] <= r["high"], r
    assert row("fd_to_reference")["low"] < row("fd_to_reference")["high"]


def test_the_kernel_distances_interval_is_as_wide_as_the_spread_of_independent_sets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The delete-d jackknife against the truth: the spread of the distance over many sets of 40."""
    monkeypatch.setattr(module, "SUBSET_SIZE", 10)
    rng = np.random.default_rng(0)
    draws = [[torch.from_numpy(rng.standard_normal((40, 2)) + shift) for shift in (0, 1)] for _ in range(200)]
    truth = np.std([kernel_distance(a, b, subsets=1, subset_size=40)[0] for a, b in draws])
    widths = []
    for a, b in draws[:12]:
        sets = [ImageSet(x.float(), images=np.zeros((40, 1, 1, 1), np.uint8)) for x in (a, b)]
        figure = row("kernel_distance_to_reference", Judge(EXTRACTOR, sets[0], sets[1], 1).measure(sets[0]))
        widths.append((figure["high"] - figure["low"]) / (2 * 1.96))
    assert np.mean(widths) == pytest.approx(truth, rel=0.35)


def test_labels_carry_the_extractors_name_and_say_fid_and_which_weights_only_with_inception() -> None:
    labels = {r["name"]: r["label"] for r in ROWS}
    assert labels["fd_to_full_precision"] == "FD2FP32(quadrants)"
    assert labels["fd_to_reference"] == "FD(quadrants) to reference"
    assert labels["kernel_distance_to_full_precision"] == "KD(quadrants) to full precision"
    assert labels["score"] == "score(quadrants)"
    assert not any(word in label.lower() for label in labels.values() for word in ("fid", "kid", "inception"))
    assert row("relative_l2")["extractor"] is None
    extractor = Inception.__new__(Inception)  # its name and note alone: the features are others'
    extractor.note, extractor.name = "Other weights.", "inception-v3:01234567:tensorflow"
    rows = Judge(extractor, FULL, REAL, 3).measure(DRAWN)
    labels = {r["name"]: r["label"] for r in rows}
    assert (labels["fd_to_reference"], labels["fd_to_full_precision"]) == ("FID to reference", "FID2FP32")
    assert (labels["kernel_distance_to_reference"], labels["score"]) == ("KID to reference", "IS")
    assert labels["spatial_fd_to_reference"] == "sFID to reference"
    assert labels["precision_to_reference"] == "precision(inception-v3:01234567:tensorflow) to reference"
    assert all(extractor.note in r["note"] for r in rows if r["extractor"] is not None)


def test_full_precision_is_not_compared_with_itself_but_its_halves_are() -> None:
    rows = Judge(EXTRACTOR, FULL, REAL, RESAMPLES).measure(FULL)
    names = {r["name"] for r in rows}
    assert {"fd_to_reference", "fd_between_halves", "gbops"} <= names
    assert not {n for n in names if "full_precision" in n} | (names & {"relative_l2", "psnr_db"})
    expected = frechet_distance(Moments.of(FULL.pooled[:12]), Moments.of(FULL.pooled[12:]))
    assert row("fd_between_halves", rows)["value"] == pytest.approx(expected)
    assert row("fd_between_halves", rows)["low"] < expected < row("fd_between_halves", rows)["high"]
    assert "12 images: the distance is biased" in row("fd_between_halves", rows)["note"]


def test_equal_images_have_no_distance_and_an_infinite_psnr_is_said_not_shown() -> None:
    rows = Judge(EXTRACTOR, FULL, None, RESAMPLES).measure(gather(batches(0)))
    assert row("fd_to_full_precision", rows)["value"] == pytest.approx(0, abs=1e-9)
    assert (row("relative_l2", rows)["value"], row("psnr_db", rows)["value"], row("ssim", rows)["value"]) == (
        0,
        None,
        1,
    )
    assert "Infinite: all images are equal" in row("psnr_db", rows)["note"]


def test_many_dimensions_have_an_interval_of_few_resamples_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST_RESAMPLED", 3)
    monkeypatch.setattr(module, "FEW_RESAMPLES", 5)
    rows = Judge(EXTRACTOR, FULL, REAL, RESAMPLES).measure(DRAWN)
    spread = frechet_interval(DRAWN.pooled, Moments.of(REAL.pooled), resamples=5, kind="normal")
    assert (row("fd_to_reference", rows)["low"], row("fd_to_reference", rows)["high"]) == pytest.approx(
        (spread["low"], spread["high"])
    )
    for name in ("fd_to_full_precision", "fd_to_reference"):
        figure = row(name, rows)
        assert figure["value"] == pytest.approx(row(name)["value"])
        assert figure["high"] - figure["value"] == pytest.approx(figure["value"] - figure["low"])
        assert "1.96 standard deviations over 5 resamples" in figure["note"]
    assert "Same seeds" in row("fd_to_full_precision", rows)["note"]


def test_images_that_were_not_finite_are_told_with_every_figure() -> None:
    rows = Judge(EXTRACTOR, FULL, REAL, RESAMPLES).measure(gather(batches(0, noise=12.0, broken=2)))
    assert all(r["note"].startswith("6 of 24 images were not finite and count as black.") for r in rows)
    assert not any("not finite" in r["note"] for r in ROWS)
