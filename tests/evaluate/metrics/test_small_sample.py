"""Notes on small sets: present below each limit, absent at it, and true."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from modiff.errors import ConfigError
from modiff.evaluate.metrics.inception_score import inception_score
from modiff.evaluate.metrics.small_sample import small_sample_note


@pytest.mark.parametrize(
    ("metric", "enough", "size", "words"),
    [
        ("frechet_distance", 2048, 128, "biased upwards"),
        ("frechet_distance", 5001, 5000, "singular"),
        ("kernel_distance", 2000, 1000, "overlap"),
        ("inception_score", 36, 10, "too low by up to 13 %"),
        ("precision_recall", 10_000, 1, "depend on n"),
        ("mean", 30, 1, "too narrow"),
    ],
)
def test_each_metric_has_a_limit(metric: Any, enough: int, size: int, words: str) -> None:
    assert small_sample_note(metric, enough, size) is None
    note = small_sample_note(metric, enough - 1, size)
    assert note is not None
    assert words in note
    assert note.startswith(f"{enough - 1} images")


def test_fewer_images_than_dimensions_are_worse_than_few_images() -> None:
    assert "singular" in (small_sample_note("frechet_distance", 128, 128) or "")
    assert "singular" not in (small_sample_note("frechet_distance", 129, 128) or "")


def test_the_score_of_few_images_is_too_low_by_what_the_note_says_at_most() -> None:
    classes, count = 10, 40
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (300, count), generator=generator)
    logs = [math.log(inception_score(torch.eye(classes)[row], splits=1)["mean"]) for row in labels]
    missing = math.log(classes) - np.mean(logs)  # certain images: the score of no end of them is 10
    assert missing == pytest.approx((classes - 1) / (2 * count), rel=0.1)


def test_an_unknown_metric_is_an_error() -> None:
    with pytest.raises(ConfigError, match="got 'fid'"):
        small_sample_note("fid", 10)  # type: ignore[arg-type]
