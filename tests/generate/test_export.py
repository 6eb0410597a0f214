"""The exported array: what numpy and the reader of the ADM evaluation suite expect, in index order, or no file."""

from __future__ import annotations

import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from modiff.errors import ConfigError, FormatError
from modiff.generate.export import export_npz
from modiff.generate.shards import Manifest, write_images
from tests.generate.fakes import image


def counting(folder: Path, num_images: int, shape: tuple[int, int, int]) -> Path:
    """A folder whose image i has the value i everywhere."""
    folder.mkdir()
    manifest = Manifest(model="m", request={}, num_images=num_images, shape=shape, batch_size=1, shard_size=2)
    for span in manifest.missing:
        values = np.arange(span.first, span.first + span.count, dtype=np.uint8)
        images = np.broadcast_to(values[:, None, None, None], (span.count, *shape))
        manifest = manifest.with_shard(write_images(folder, manifest, span.first, images, {}))
    manifest.save(folder)
    return folder


@pytest.mark.parametrize("num_images", [None, 5])
def test_it_is_a_file_as_numpy_itself_writes_it(images: Path, tmp_path: Path, num_images: int | None) -> None:
    """Readers that stream look at the member's header by hand: one stored npy of version 1, C order."""
    for name in "ab":
        assert export_npz(images, tmp_path / name, num_images=num_images) == (num_images or 11, 4, 5, 3)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    np.savez(tmp_path / "c.npz", np.stack([image(index) for index in range(num_images or 11)]))
    members = []
    for name in ("a", "c.npz"):
        with zipfile.ZipFile(tmp_path / name) as archive:
            (entry,) = archive.infolist()
            assert archive.testzip() is None
            members.append((entry.filename, entry.compress_type, archive.read(entry)))
    assert members[0] == members[1]


def test_grey_images_can_be_repeated_in_three_channels_and_two_channels_cannot(tmp_path: Path) -> None:
    folder = counting(tmp_path / "grey", 5, (2, 3, 1))
    assert export_npz(folder, tmp_path / "rgb.npz", rgb=True) == (5, 2, 3, 3)
    assert np.load(tmp_path / "rgb.npz")["arr_0"].sum() == 3 * 2 * 3 * (0 + 1 + 2 + 3 + 4)
    with pytest.raises(ConfigError, match="expected images of 1 or 3 channels, got 2"):
        export_npz(counting(tmp_path / "two", 5, (2, 3, 2)), tmp_path / "c.npz", rgb=True)


def test_memory_stays_at_a_few_shards(tmp_path: Path) -> None:
    folder = counting(tmp_path / "large", 200, (64, 64, 3))
    tracemalloc.start()
    try:
        export_npz(folder, tmp_path / "a.npz")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40 * 64 * 64 * 3  # of 200 images; a shard has two


@pytest.mark.parametrize("how", ["unfinished", "damaged"])
def test_missing_images_are_an_error_and_the_old_file_is_kept(images: Path, tmp_path: Path, how: str) -> None:
    path, shard = tmp_path / "a.npz", images / "shard-000002.safetensors"
    path.write_bytes(b"old")
    shard.write_bytes(shard.read_bytes()[: -1 if how == "damaged" else None])
    message = "expected 12 images, got 8" if how == "unfinished" else r"shard-000002\.safetensors: expected a whole"
    with pytest.raises(FormatError, match=message):
        export_npz(images, path, num_images=12 if how == "unfinished" else None)
    assert path.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "images"]
