"""Inception score: closed forms, plain loops, torchmetrics, splits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torchmetrics.image.inception import InceptionScore as Theirs

from modiff.errors import ConfigError
from modiff.evaluate.metrics.inception_score import inception_score
from tests.reference import metrics as reference


def probabilities(seed: int, count: int, classes: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(count, classes, generator=generator, dtype=torch.float64)).softmax(1)


def test_certain_and_even_images_score_the_number_of_classes() -> None:
    mean, std = pytest.approx(6, rel=1e-12), pytest.approx(0, abs=1e-12)
    assert inception_score(torch.eye(6).repeat(3, 1), splits=3) == {"mean": mean, "std": std, "splits": 3}


def test_images_that_are_all_alike_score_1() -> None:
    assert inception_score(torch.full((7, 5), 0.2), splits=1)["mean"] == pytest.approx(1, abs=1e-12)
    assert inception_score(torch.eye(5)[[2] * 7], splits=1)["mean"] == 1


def test_two_certain_classes_in_unequal_parts_score_the_exponent_of_their_entropy() -> None:
    rows = torch.eye(2)[[0, 0, 0, 1]]
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert inception_score(rows, splits=1)["mean"] == pytest.approx(math.exp(entropy), rel=1e-12)


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 5), st.integers(2, 6))
def test_it_agrees_with_plain_loops(seed: int, splits: int, size: int, classes: int) -> None:
    rows = probabilities(seed, splits * size, classes)
    expected = reference.inception_score(rows.tolist(), splits)
    found = inception_score(rows, splits=splits)
    assert found["mean"] == pytest.approx(np.mean(expected), rel=1e-12)
    assert found["std"] == pytest.approx(np.std(expected), rel=1e-9, abs=1e-12)


@given(st.integers(0, 10**6))
def test_the_order_within_a_split_does_not_matter_and_the_score_stays_in_its_range(seed: int) -> None:
    rows = probabilities(seed, 12, 4)
    score = inception_score(rows, splits=1)["mean"]
    assert inception_score(rows[torch.randperm(12)], splits=1)["mean"] == pytest.approx(score, rel=1e-12)
    assert 1 - 1e-12 <= score <= 4 + 1e-12


class Logits(nn.Module):
    """Hands its images on as logits."""

    num_features = 5

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


@pytest.mark.filterwarnings("ignore:Metric .InceptionScore. will save all:UserWarning")
@pytest.mark.filterwarnings("ignore:std:UserWarning")  # theirs, of one split
def test_it_agrees_with_torchmetrics() -> None:
    logits = 2 * torch.randn(40, 5, dtype=torch.float64)
    theirs = Theirs(feature=Logits(), splits=1).set_dtype(torch.float64)  # one split: it shuffles
    theirs.update(logits.view(40, 1, 1, 5))
    assert inception_score(logits.softmax(1), splits=1)["mean"] == pytest.approx(float(theirs.compute()[0]), rel=1e-9)


def test_splits_are_consecutive_and_take_every_image() -> None:
    rows = torch.eye(3)[[0, 1, 2, 0, 0, 0, 1]]  # parts of 3, 2, 2: entropies ln 3, 0, ln 2
    found = inception_score(rows, splits=3)
    assert found["mean"] == pytest.approx((3 + 1 + 2) / 3)
    assert found["std"] == pytest.approx(math.sqrt(2 / 3))


@pytest.mark.parametrize(
    ("rows", "splits", "message"),
    [
        (torch.randn(4, 3), 1, "expected probabilities"),
        (torch.tensor([[1.5, -0.5]]), 1, r"a least value of -0\.5"),
        (torch.full((4, 3), 0.3), 1, r"a sum of 0\.9"),
        (torch.eye(3), 4, "1 to 3 splits for 3 images, got 4"),
        (torch.eye(3), 0, "got 0"),
        (torch.zeros(0, 3), 1, "for 0 images"),
    ],
)
def test_mistakes_are_refused(rows: Tensor, splits: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        inception_score(rows, splits=splits)
