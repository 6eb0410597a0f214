"""Real images from every kind of file: the same images in the same order, and a word on what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modiff.errors import FormatError
from modiff.evaluate import suite_reference as module
from modiff.evaluate.suite_reference import read_reference, reference_digest
from modiff.generate.shards import Manifest, write_shard

IMAGES = np.arange(12 * 4 * 5 * 3, dtype=np.uint32).reshape(12, 4, 5, 3).astype(np.uint8)
ODD = np.zeros((1, 2, 2, 1), np.uint8)


def npz(folder: Path) -> Path:
    np.savez(folder / "a.npz", labels=np.arange(12), arr_0=IMAGES)
    return folder / "a.npz"


def npz_by_another_name(folder: Path) -> Path:
    np.savez(folder / "a.npz", images=IMAGES, labels=np.arange(12))
    return folder / "a.npz"


def npy(folder: Path) -> Path:
    np.save(folder / "a.npy", IMAGES)
    return folder / "a.npy"


def arrays(folder: Path) -> Path:
    for name, part in (("part2", IMAGES[5:9]), ("part10", IMAGES[9:]), ("part1", IMAGES[:5])):
        np.save(folder / f"{name}.npy", part)
    Image.fromarray(IMAGES[0]).save(folder / "preview.png")
    return folder


def pictures(folder: Path) -> Path:
    for i in reversed(range(12)):
        Image.fromarray(IMAGES[i]).save(folder / f"{i}.png")
    (folder / "labels.txt").write_text("")
    return folder


def generated(folder: Path) -> Path:
    manifest = Manifest(model="m", request={}, num_images=12, shape=(4, 5, 3), batch_size=4, shard_size=8)
    for first in (0, 8):
        shard = write_shard(folder, manifest, first, IMAGES[first : first + 8], {})
        manifest = manifest.with_shard(shard)
    manifest.save(folder)
    return folder


KINDS = (npz, npz_by_another_name, npy, arrays, pictures, generated)


@pytest.mark.parametrize("write", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_gives_all_images_in_order(
    write: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 5)
    parts = list(read_reference(write(tmp_path)))
    assert np.array_equal(np.concatenate(parts), IMAGES)
    assert max(map(len, parts)) <= 8


def test_grey_images_get_their_channel(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", IMAGES[..., 0])
    assert np.array_equal(next(read_reference(tmp_path / "a.npy")), IMAGES[..., :1])
    Image.fromarray(IMAGES[0, ..., 0]).save(tmp_path / "a.png")
    assert np.array_equal(next(read_reference(tmp_path / "a.png")), IMAGES[:1, ..., :1])


@pytest.mark.parametrize("write", KINDS, ids=lambda kind: kind.__name__)
def test_the_digest_is_that_of_the_content(write: Callable[[Path], Path], tmp_path: Path) -> None:
    path = write(tmp_path)
    before = reference_digest(path)
    assert reference_digest(path) == before
    changed = next(f for f in sorted(tmp_path.iterdir()) if f.suffix in (".npz", ".npy", ".png", ".json"))
    content = bytearray(changed.read_bytes())
    content[-1] ^= 1
    changed.write_bytes(content)
    assert reference_digest(path) != before


@pytest.mark.parametrize(
    ("name", "array"),
    [("float", IMAGES / 255), ("flat", IMAGES.reshape(12, -1)), ("empty", IMAGES[:0])],
)
def test_arrays_that_are_no_images_are_named(name: str, array: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / f"{name}.npy", array)
    with pytest.raises(FormatError, match=rf"{name}\.npy: expected uint8 images \(N, H, W, C\), got"):
        list(read_reference(tmp_path / f"{name}.npy"))


def test_nothing_there_an_empty_folder_and_a_damaged_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="got nothing there"):
        list(read_reference(tmp_path / "absent"))
    with pytest.raises(FormatError, match="got a folder without any"):
        list(read_reference(tmp_path))
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04nothing")
    with pytest.raises(FormatError, match=r"a\.npz: expected images, got"):
        list(read_reference(tmp_path / "a.npz"))
    (tmp_path / "b.png").write_bytes(b"nothing")
    with pytest.raises(FormatError, match=r"b\.png: expected images, got UnidentifiedImageError"):
        list(read_reference(tmp_path / "b.png"))


def test_images_of_two_sizes_are_an_error(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", IMAGES)
    np.save(tmp_path / "b.npy", ODD)
    with pytest.raises(FormatError, match=r"b\.npy: expected images of 4 x 5 x 3 like those before, got 2 x 2 x 1"):
        list(read_reference(tmp_path))


def test_objects_are_not_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"any": "object"}], dtype=object), allow_pickle=True)
    with pytest.raises(FormatError, match=r"a\.npy: expected images, got ValueError"):
        list(read_reference(tmp_path / "a.npy"))
