"""Precision and recall: equal and disjoint sets, plain loops, borders, bounded memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modiff.errors import ConfigError
from modiff.evaluate.metrics import precision_recall as module
from modiff.evaluate.metrics.precision_recall import precision_recall, within_manifold
from tests.evaluate.metrics.features import feature_sets
from tests.reference import metrics as reference


@given(feature_sets(smallest=4), st.integers(1, 3))
def test_a_set_lies_within_its_own_manifold_also_with_copies_in_it(rows: Tensor, neighbours: int) -> None:
    found = precision_recall(rows, rows[torch.randperm(len(rows))], neighbours=neighbours)
    assert found == {"precision": 1, "recall": 1, "neighbours": neighbours}


def test_sets_that_are_far_apart_share_nothing() -> None:
    rows = torch.randn(20, 4)
    assert precision_recall(rows, rows + 1000) == {"precision": 0, "recall": 0, "neighbours": 3}


def test_one_kind_of_image_out_of_two_is_precise_and_forgets_the_other() -> None:
    left, right = torch.randn(30, 2), torch.randn(30, 2) + 100
    generated = left[torch.randint(30, (40,))] + 1e-3
    found = precision_recall(generated, torch.cat([left, right]), neighbours=3)
    assert found["precision"] == 1
    assert 0.2 < found["recall"] <= 0.5
    turned = precision_recall(torch.cat([left, right]), generated, neighbours=3)
    assert (turned["precision"], turned["recall"]) == (found["recall"], found["precision"])


@given(feature_sets(dimension=2, smallest=1), feature_sets(dimension=2, smallest=5), st.integers(1, 4))
def test_membership_agrees_with_plain_loops(queries: Tensor, manifold: Tensor, neighbours: int) -> None:
    # Whole numbers, whose squared distances are exact: a border is met or missed by both.
    queries, manifold = queries.round().clamp(-50, 50), manifold.round().clamp(-50, 50)
    expected = reference.within_manifold(queries.tolist(), manifold.tolist(), neighbours)
    assert within_manifold(queries, manifold, neighbours=neighbours).tolist() == expected


def test_the_border_belongs_to_the_ball_and_the_point_itself_is_no_neighbour() -> None:
    line = torch.tensor([[0.0], [1.0], [3.0]])  # radii to the nearest other: 1, 1, 2
    asked = torch.tensor([[-1.0], [-1.01], [5.0], [5.01], [2.5]])
    assert within_manifold(asked, line, neighbours=1).tolist() == [True, False, True, False, True]


def test_distances_are_exact_far_from_zero_where_products_would_cancel() -> None:
    points = torch.randn(40, 6, dtype=torch.float64) + 1e4
    manifold = points.repeat(5, 1)  # four copies and the point itself: every radius is 0
    assert within_manifold(points, manifold).all()
    assert not within_manifold(points + 1e-6, manifold).any()


def test_any_chunk_of_memory_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    real, made = torch.randn(23, 6), torch.randn(31, 6) * 1.2
    whole = within_manifold(made, real)
    for size in (1, 8 * 23, 5 * 8 * 23):
        monkeypatch.setattr(module, "CHUNK_BYTES", size)
        assert torch.equal(within_manifold(made, real), whole)
    assert 0 < int(whole.sum()) < 31


def test_sets_that_are_too_small_or_of_another_extractor_are_errors() -> None:
    with pytest.raises(ConfigError, match="1 to 2 neighbours in a set of 3, got 3"):
        precision_recall(torch.randn(9, 2), torch.randn(3, 2))
    with pytest.raises(ConfigError, match="got 0"):
        precision_recall(torch.randn(9, 2), torch.randn(9, 2), neighbours=0)
    with pytest.raises(ConfigError, match="one dimension, got 2 and 3"):
        precision_recall(torch.randn(9, 2), torch.randn(9, 3))
