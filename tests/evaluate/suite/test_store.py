"""The folder of a run: batches come back as they were, and are counted by what is in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from modiff import presets
from modiff.errors import FormatError
from modiff.evaluate.features.extractor import Features
from modiff.evaluate.suite.plans import Plan
from modiff.evaluate.suite.store import DrawnImages, Store

PLAN = Plan(name="plain", steps=4, config=presets.plain(8, 4))


def store(folder: Path) -> Store:
    return Store(folder, 4)


def batch(count: int, *, rich: bool = True) -> tuple[DrawnImages, Features]:
    images = np.arange(count * 12, dtype=np.uint8).reshape(count, 2, 2, 3)
    rows = torch.linspace(0, 1, count * 5).reshape(count, 5)
    features = Features(rows, rows[:, :2] if rich else None, rows[:, :3] if rich else None)
    return DrawnImages(images, 1.25, 77, 1, 0.1), features


def fill(kept: Store, num_images: int) -> None:
    for indices in kept.missing(PLAN, num_images):
        kept.save(PLAN, indices, *batch(len(indices)))


@pytest.mark.parametrize("rich", [True, False])
def test_a_batch_comes_back_bit_for_bit(tmp_path: Path, rich: bool) -> None:
    kept, (drawn, features) = store(tmp_path), batch(4, rich=rich)
    kept.save(PLAN, range(4), drawn, features)
    ((drawn_again, features_again),) = store(tmp_path).load(PLAN, 4)
    assert drawn_again[1:] == drawn[1:]
    torch.testing.assert_close(torch.from_numpy(drawn_again.images), torch.from_numpy(drawn.images), rtol=0, atol=0)
    for rows, rows_again in zip(features, features_again, strict=True):
        assert rows_again is rows is None or torch.equal(rows, rows_again)


def test_more_images_keep_the_full_batches_and_draw_the_short_one_again(tmp_path: Path) -> None:
    kept = store(tmp_path)
    fill(kept, 10)
    assert kept.missing(PLAN, 10) == []
    assert kept.missing(PLAN, 13) == [range(8, 12), range(12, 13)]
    assert [len(drawn.images) for drawn, _ in kept.load(PLAN, 10)] == [4, 4, 2]


@pytest.mark.parametrize("keep", [0, 10, 300])
def test_a_damaged_batch_is_named_and_says_what_to_do(tmp_path: Path, keep: int) -> None:
    kept = store(tmp_path)
    fill(kept, 4)
    path = tmp_path / PLAN.key / "000000-000004.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FormatError, match=r"000000-000004\.safetensors: expected a batch of 4 .* Delete it"):
        list(kept.load(PLAN, 4))


def test_a_batch_of_another_length_is_named(tmp_path: Path) -> None:
    kept = store(tmp_path)
    kept.save(PLAN, range(4), *batch(3))
    with pytest.raises(FormatError, match="expected a batch of 4 images, got ValueError: 3 images"):
        list(kept.load(PLAN, 4))
