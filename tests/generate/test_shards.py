"""Shards: codes as stated, whole or known to be damaged, under their own name, in index order; one array of them."""

import dataclasses
import hashlib
import json
import zipfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from modiff.errors import ConfigError, FormatError
from modiff.generate.shards import (
    Manifest,
    Shard,
    export_npz,
    read_images,
    read_shard,
    to_uint8,
    whole_shards,
    write_images,
)

HERE, THERE = {"torch": "1", "threads": 1}, {"torch": "2", "threads": 1}


def manifest(num_images: int = 5, **changes: Any) -> Manifest:
    request = {"seed": 0, "config": None}
    values = {"model": "m", "request": request, "num_images": num_images, "shape": (2, 3, 1), "batch_size": 1}
    return Manifest(**values | {"shard_size": 2} | changes)


def some(first: int, count: int, shape: tuple[int, ...] = (2, 3, 1)) -> np.ndarray:
    """Images whose pixels count on from one to the next."""
    return np.arange(first * np.prod(shape), (first + count) * np.prod(shape)).astype(np.uint8).reshape(count, *shape)


def filled(folder: Path, num_images: int = 5, shape: tuple[int, ...] = (2, 3, 1)) -> Manifest:
    """A folder of `some` images, two in a shard, the second shard from another environment."""
    folder.mkdir(exist_ok=True)
    made = manifest(num_images, shape=shape)
    for number, span in enumerate(made.missing):
        images = some(span.first, span.count, shape)
        made = made.with_shard(write_images(folder, made, span.first, images, THERE if number == 1 else HERE))
    made.save(folder)
    return made


@given(st.floats(min_value=0, max_value=1, width=32))
def test_codes_are_rounded_half_to_even_of_the_exact_product(value: float) -> None:
    assert to_uint8(np.array([value], dtype=np.float32))[0] == round(Fraction(value) * 255)
    assert to_uint8(np.array([-value, 2.5 / 255, 1 + value])).tolist() == [0, 2, 255]


def test_a_shard_is_a_safetensors_file_of_uint8_whose_bytes_depend_on_its_images_alone(tmp_path: Path) -> None:
    made, _ = filled(tmp_path / "a"), filled(tmp_path / "b")
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    images = load_file(tmp_path / "a" / "shard-000001.safetensors")["images"]
    assert images.dtype == np.uint8
    assert np.array_equal(images, some(2, 2))
    assert Manifest.load(tmp_path / "a") == made
    assert made.to_dict()["environments"] == [HERE, THERE]
    for shard in made.shards:
        assert hashlib.sha256((tmp_path / "a" / shard.file).read_bytes()).hexdigest() == shard.sha256


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 7))
def test_missing_is_what_more_images_need_and_no_more(before: int, now: int, shard_size: int) -> None:
    made = manifest(before, shard_size=shard_size)
    for span in made.missing:
        made = made.with_shard(Shard(**vars(span), file=made.file_of(span.first), sha256="", environment=HERE))
    assert (made.missing, made.present) == ((), before)
    extended = dataclasses.replace(made, num_images=now)
    there = {shard.first: shard.count for shard in made.shards}
    covered = {i for span in extended.missing for i in range(span.first, span.first + span.count)}
    old = {first + i for first, count in there.items() for i in range(count)}
    assert covered | old >= set(range(now)) >= covered
    assert extended.present + len(covered) == now
    assert all(there.get(span.first, 0) < span.count <= shard_size for span in extended.missing)


def test_images_come_in_index_order_or_are_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"without manifest\.json"):
        read_images(tmp_path)
    filled(tmp_path)
    shards = list(read_images(tmp_path))
    assert [len(shard) for shard in shards] == [2, 2, 1]
    assert all(shard.flags.writeable for shard in shards)  # torch warns of others
    for num_images in (None, 3, 4):
        assert np.array_equal(np.concatenate(list(read_images(tmp_path, num_images))), some(0, num_images or 5))
    for count, got in ((0, 0), (6, 4)):  # the last shard has one image and would need two: it does not count
        with pytest.raises(FormatError, match=f"expected {count} images, got {got} in whole shards"):
            read_images(tmp_path, count)


DAMAGE = {
    "cut": lambda content: content[:-1],
    "a pixel": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "note": lambda content: content.replace(b"sha256", b"sha257", 1),
    "job": lambda content: content.replace(b'job\\": \\"', b'job\\": \\"0', 1),
    "first": lambda content: content.replace(b'first\\": 2', b'first\\": 4', 1),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_shard_is_known(tmp_path: Path, how: str) -> None:
    made, path = filled(tmp_path), tmp_path / "shard-000001.safetensors"
    content = path.read_bytes()
    path.write_bytes(DAMAGE[how](content))
    assert path.read_bytes() != content
    whole, damaged = whole_shards(tmp_path, made)
    assert [shard.first for shard in whole] == [0, 4]
    assert damaged == (path.name,)
    images = read_images(tmp_path)
    assert np.array_equal(next(images), some(0, 2))
    with pytest.raises(FormatError, match=r"shard-000001\.safetensors: expected a whole shard"):
        next(images)


def test_a_shard_that_is_gone_or_was_exchanged_is_known_when_it_is_read(tmp_path: Path) -> None:
    made = filled(tmp_path)
    write_images(tmp_path, made, 4, some(9, 1), HERE)  # whole, of this job, but not what the manifest lists
    with pytest.raises(FormatError, match=r"another sha256 than manifest\.json says"):
        list(read_images(tmp_path))
    (tmp_path / "shard-000000.safetensors").unlink()
    with pytest.raises(FormatError, match="got FileNotFoundError"):
        list(read_images(tmp_path))


def test_a_shard_of_another_job_or_index_is_refused(tmp_path: Path) -> None:
    made = filled(tmp_path)
    for change in {"request": {"seed": 1}}, {"batch_size": 2}, {"shard_size": 3}, {"shape": (3, 2, 1)}:
        with pytest.raises(ConfigError, match=r"shard-000000\.safetensors: .* got one of another job"):
            whole_shards(tmp_path, dataclasses.replace(made, **change))
    (tmp_path / "shard-000001.safetensors").replace(tmp_path / "shard-000000.safetensors")
    with pytest.raises(ConfigError, match="got the images from 2 on"):
        read_shard(tmp_path, "shard-000000.safetensors", made)


LISTED = {"file": "shard-000000.safetensors", "first": 0, "count": 2, "sha256": "", "environment": 0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("[" * 100_000, "RecursionError"),
        ({"format": 2}, "another format"),
        ({"shard_size": 0}, "sizes"),
        ({"shards": [LISTED | {"environment": 2}]}, "KeyError"),
        ({"shards": [LISTED | {"file": "/dev/zero"}]}, "file /dev/zero for the images from 0 on"),
        ({"shards": [LISTED | {"first": 2}]}, "file shard-000000.safetensors for the images from 2 on"),
    ],
)
def test_a_manifest_of_another_kind_is_one_error(tmp_path: Path, changes: Any, message: str) -> None:
    filled(tmp_path)
    path = tmp_path / "manifest.json"
    values = json.loads(path.read_text())
    path.write_text(changes if isinstance(changes, str) else json.dumps(values | changes))
    with pytest.raises(FormatError, match=message) as caught:
        Manifest.load(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("num_images", [None, 3])
def test_it_is_a_file_as_numpy_itself_writes_it(tmp_path: Path, num_images: int | None) -> None:
    """Readers that stream look at the member's header by hand: one stored npy of version 1, C order."""
    filled(tmp_path / "images")
    for name in "ab":
        assert export_npz(tmp_path / "images", tmp_path / name, num_images=num_images) == (num_images or 5, 2, 3, 1)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    np.savez(tmp_path / "c.npz", some(0, num_images or 5))
    members = []
    for name in ("a", "c.npz"):
        with zipfile.ZipFile(tmp_path / name) as archive:
            (entry,) = archive.infolist()
            assert archive.testzip() is None
            members.append((entry.filename, entry.compress_type, archive.read(entry)))
    assert members[0] == members[1]


def test_grey_images_can_be_repeated_in_three_channels_and_two_channels_cannot(tmp_path: Path) -> None:
    filled(tmp_path / "grey"), filled(tmp_path / "two", shape=(2, 3, 2))
    assert export_npz(tmp_path / "grey", tmp_path / "rgb.npz", rgb=True) == (5, 2, 3, 3)
    assert np.array_equal(np.load(tmp_path / "rgb.npz")["arr_0"], np.repeat(some(0, 5), 3, axis=3))
    with pytest.raises(ConfigError, match="expected images of 1 or 3 channels, got 2"):
        export_npz(tmp_path / "two", tmp_path / "c.npz", rgb=True)


def test_missing_images_are_an_error_and_the_old_file_is_kept(tmp_path: Path) -> None:
    filled(tmp_path / "images")
    path, shard = tmp_path / "a.npz", tmp_path / "images" / "shard-000002.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(FormatError, match="expected 6 images, got 4"):
        export_npz(tmp_path / "images", path, num_images=6)
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(FormatError, match=r"shard-000002\.safetensors: expected a whole"):
        export_npz(tmp_path / "images", path)
    assert path.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "images"]
