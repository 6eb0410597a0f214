"""Images as bytes, and real ones from files of every kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modiff.errors import FormatError
from modiff.evaluate.pipelines import DrawnImages
from modiff.evaluate.suite import images as module
from modiff.evaluate.suite.images import as_bytes, read_reference, reference_digest
from modiff.generate.shards import Manifest, write_images


def test_pixels_are_rounded_to_nearest_clipped_and_those_that_are_not_finite_counted() -> None:
    images = np.array([[0.0, 1.0, 0.5, 1.4 / 255], [-1.0, 2.0, 1.6 / 255, 1.0], [np.nan, np.inf, 1, 0]])
    drawn = as_bytes(DrawnImages(images.reshape(3, 2, 2, 1), 1.5))
    assert drawn.images.reshape(3, 4).tolist() == [[0, 255, 128, 1], [0, 255, 2, 255], [0, 255, 255, 0]]
    assert (drawn.broken, drawn.seconds) == (1, 1.5)


IMAGES = np.arange(12 * 4 * 5 * 3, dtype=np.uint32).reshape(12, 4, 5, 3).astype(np.uint8)


def generated(folder: Path) -> Path:
    manifest = Manifest(model="m", request={}, num_images=12, shape=(4, 5, 3), batch_size=4, shard_size=8)
    for first in (0, 8):
        manifest = manifest.with_shard(write_images(folder, manifest, first, IMAGES[first : first + 8], {}))
    manifest.save(folder)
    return folder


def test_every_kind_gives_all_images_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 5)
    np.savez(tmp_path / "a.npz", labels=np.arange(12), arr_0=IMAGES)
    np.save(tmp_path / "a.npy", IMAGES)
    (tmp_path / "pictures").mkdir()
    for i in reversed(range(12)):
        Image.fromarray(IMAGES[i]).save(tmp_path / "pictures" / f"{i}.png")
    (tmp_path / "pictures" / "labels.txt").write_text("")
    kinds = [tmp_path / "a.npz", tmp_path / "a.npy", tmp_path / "pictures", generated(tmp_path / "generated")]
    for path in kinds:
        batches = list(read_reference(path))
        assert np.array_equal(np.concatenate(batches), IMAGES)
        assert max(map(len, batches)) <= 8
    digests = {reference_digest(path) for path in kinds}
    np.save(tmp_path / "a.npy", IMAGES ^ (np.arange(IMAGES.size).reshape(IMAGES.shape) == IMAGES.size - 1))
    assert len(digests) == 1
    assert reference_digest(tmp_path / "a.npy") not in digests


def test_arrays_that_are_no_images_damaged_files_and_nothing_at_all_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(FormatError, match="got none there"):
            list(read_reference(path))
    for name, array in (("float", IMAGES / 255), ("flat", IMAGES.reshape(12, -1)), ("empty", IMAGES[:0])):
        np.save(tmp_path / f"{name}.npy", array)
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04nothing")
    np.savez(tmp_path / "nothing.npz")
    (tmp_path / "b.png").write_bytes(b"nothing")
    for file in ("float.npy", "flat.npy", "empty.npy", "a.npz", "nothing.npz", "b.png"):
        with pytest.raises(FormatError, match=rf"{file}: expected uint8 images \(N, H, W, C\), got \w+: "):
            list(read_reference(tmp_path / file))
    Image.fromarray(IMAGES[0]).save(tmp_path / "a.png")
    Image.fromarray(IMAGES[0, :2]).save(tmp_path / "b.png")
    with pytest.raises(FormatError, match="expected images of 4 x 5 x 3 like those before, got 2 x 5 x 3"):
        list(read_reference(tmp_path))
