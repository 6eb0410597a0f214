"""The folder of a run: batches come back as they were, and are counted by what is in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from modiff import presets
from modiff.errors import FormatError
from modiff.evaluate.suite.plans import Plan
from modiff.evaluate.suite.store import SavedBatch, Store

PLAN = Plan(name="plain", steps=4, config=presets.plain(8, 4))


def store(folder: Path) -> Store:
    return Store(folder, 4)


def batch(count: int, *, rich: bool = True) -> SavedBatch:
    images = np.arange(count * 12, dtype=np.uint8).reshape(count, 2, 2, 3)
    rows = np.linspace(0, 1, count * 5, dtype=np.float32).reshape(count, 5)
    return SavedBatch(images, rows, rows[:, :2] if rich else None, rows[:, :3] if rich else None, 1.25, 77, 1)


def fill(kept: Store, num_images: int) -> None:
    for indices in kept.missing(PLAN, num_images):
        kept.save(PLAN, indices, batch(len(indices)))


@pytest.mark.parametrize("rich", [True, False])
def test_a_batch_comes_back_bit_for_bit(tmp_path: Path, rich: bool) -> None:
    kept, wanted = store(tmp_path), batch(4, rich=rich)
    kept.save(PLAN, range(4), wanted)
    (found,) = store(tmp_path).load(PLAN, 4)
    for name, value in wanted._asdict().items():
        if isinstance(value, np.ndarray):
            assert getattr(found, name).dtype == value.dtype
            assert np.array_equal(getattr(found, name), value)
        else:
            assert getattr(found, name) == value


def test_what_is_missing_is_what_was_not_saved(tmp_path: Path) -> None:
    kept = store(tmp_path)
    assert kept.missing(PLAN, 10) == [range(4), range(4, 8), range(8, 10)]
    kept.save(PLAN, range(4, 8), batch(4))
    assert store(tmp_path).missing(PLAN, 10) == [range(4), range(8, 10)]


def test_more_images_keep_the_full_batches_and_draw_the_short_one_again(tmp_path: Path) -> None:
    kept = store(tmp_path)
    fill(kept, 10)
    assert kept.missing(PLAN, 10) == []
    assert kept.missing(PLAN, 13) == [range(8, 12), range(12, 13)]
    assert [len(b.images) for b in kept.load(PLAN, 10)] == [4, 4, 2]


@pytest.mark.parametrize("keep", [0, 10, 300])
def test_a_damaged_batch_is_named_and_says_what_to_do(tmp_path: Path, keep: int) -> None:
    kept = store(tmp_path)
    fill(kept, 4)
    path = tmp_path / PLAN.key / "000000-000004.npz"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FormatError, match=r"000000-000004\.npz: expected a batch of 4 images, got .* Delete it"):
        list(kept.load(PLAN, 4))


def test_a_batch_of_another_length_is_named(tmp_path: Path) -> None:
    kept = store(tmp_path)
    kept.save(PLAN, range(4), batch(3))
    with pytest.raises(FormatError, match="expected a batch of 4 images, got ValueError: 3 images"):
        list(kept.load(PLAN, 4))


def test_a_batch_never_runs_code(tmp_path: Path) -> None:
    kept = store(tmp_path)
    path = tmp_path / PLAN.key / "000000-000004.npz"
    path.parent.mkdir()
    np.savez(path, images=np.array([{"any": "object"}], dtype=object))
    with pytest.raises(FormatError, match="Delete it"):
        list(kept.load(PLAN, 4))


def test_a_row_is_kept_only_for_what_it_was_computed_from(tmp_path: Path) -> None:
    kept, row = store(tmp_path), {"metrics": [{"value": 0.5}]}
    assert kept.row(PLAN, {"n": 4}) is None
    kept.save_row(PLAN, {"n": 4, "t": (1, 2)}, row)
    assert store(tmp_path).row(PLAN, {"n": 4, "t": (1, 2)}) == row
    assert kept.row(PLAN, {"n": 5, "t": (1, 2)}) is None
    (tmp_path / PLAN.key / "row.json").write_text("{}")
    assert kept.row(PLAN, {"n": 4, "t": (1, 2)}) is None
