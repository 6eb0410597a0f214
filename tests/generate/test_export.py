"""The exported array: what numpy and the reader of the ADM evaluation suite expect, in index order, or no file."""

from __future__ import annotations

import errno
import tracemalloc
import zipfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from modiff.errors import ConfigError, FormatError
from modiff.generate import export
from modiff.generate.export import export_npz
from modiff.generate.job import Job
from modiff.generate.run import run_job
from modiff.generate.shards import Manifest, write_images
from tests.generate.fakes import FakeEngine, image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run_job(Job(model="fake", num_images=11, batch_size=2, shard_size=4), tmp_path / "images", engine=FakeEngine())
    return tmp_path / "images"


def counting(folder: Path, num_images: int = 5, shape: tuple[int, int, int] = (2, 3, 1)) -> Path:
    """A folder whose image i has the value i everywhere."""
    folder.mkdir()
    manifest = Manifest(model="m", request={}, num_images=num_images, shape=shape, batch_size=1, shard_size=2)
    for span in manifest.missing:
        values = np.arange(span.first, span.first + span.count, dtype=np.uint8)
        images = np.broadcast_to(values[:, None, None, None], (span.count, *shape)).copy()
        manifest = manifest.with_shard(write_images(folder, manifest, span.first, images, {}))
    manifest.save(folder)
    return folder


def test_numpy_reads_the_images_in_index_order(folder: Path, tmp_path: Path) -> None:
    whole = np.stack([image(index) for index in range(11)])
    for name, num_images in (("a.npz", None), ("b.npz", None), ("c.npz", 5)):
        assert export_npz(folder, tmp_path / name, num_images=num_images) == (num_images or 11, 4, 5, 3)
        with np.load(tmp_path / name) as file:
            assert file.files == ["arr_0"]
            assert file["arr_0"].dtype == np.uint8
            assert np.array_equal(file["arr_0"], whole[:num_images])
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_it_reads_as_a_file_of_numpy_itself(folder: Path, tmp_path: Path) -> None:
    """Readers that stream look at the member's header by hand: one stored npy of version 1, C order."""
    export_npz(folder, tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", np.load(tmp_path / "a.npz")["arr_0"])
    members = []
    for name in "ab":
        with zipfile.ZipFile(tmp_path / f"{name}.npz") as archive:
            (entry,) = archive.infolist()
            assert archive.testzip() is None
            members.append((entry.filename, entry.compress_type, archive.read(entry)))
    assert members[0] == members[1]


def test_grey_images_can_be_repeated_in_three_channels_and_two_channels_cannot(tmp_path: Path) -> None:
    folder = counting(tmp_path / "grey")
    assert export_npz(folder, tmp_path / "grey.npz") == (5, 2, 3, 1)
    assert export_npz(folder, tmp_path / "rgb.npz", rgb=True) == (5, 2, 3, 3)
    one, three = (np.load(tmp_path / name)["arr_0"] for name in ("grey.npz", "rgb.npz"))
    assert np.array_equal(three, np.repeat(one, 3, axis=3))
    with pytest.raises(ConfigError, match="expected images of 1 or 3 channels, got 2"):
        export_npz(counting(tmp_path / "two", shape=(2, 3, 2)), tmp_path / "c.npz", rgb=True)


def test_memory_stays_at_a_few_shards(tmp_path: Path) -> None:
    folder = counting(tmp_path / "large", num_images=200, shape=(64, 64, 3))
    tracemalloc.start()
    try:
        export_npz(folder, tmp_path / "a.npz")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40 * 64 * 64 * 3  # of 200 images; a shard has two


@pytest.mark.parametrize("how", ["unfinished", "damaged", "gone"])
def test_missing_images_are_an_error_and_the_old_file_is_kept(folder: Path, tmp_path: Path, how: str) -> None:
    path, shard = tmp_path / "a.npz", folder / "shard-000002.safetensors"
    path.write_bytes(b"old")
    shard.unlink() if how == "gone" else shard.write_bytes(shard.read_bytes()[: -1 if how == "damaged" else None])
    message = "expected 12 images, got 8" if how == "unfinished" else r"shard-000002\.safetensors: expected a whole"
    with pytest.raises(FormatError, match=message):
        export_npz(folder, path, num_images=12 if how == "unfinished" else None)
    assert path.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "images"]


def test_a_disk_without_room_is_an_error_before_a_file_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(0, 0, 11 * 4 * 5 * 3 - 1)
    monkeypatch.setattr(export.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="No space left on device: the array needs") as caught:
        export_npz(folder, tmp_path / "a.npz")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "a.npz"))
    assert not (tmp_path / "a.npz").exists()
