"""Files are whole or not there, the old one survives any failure, and trouble is found before the work starts."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import BinaryIO

import pytest

from modiff.errors import FormatError
from modiff.files import check_writable, new_folder, write_atomically, write_json


def full_disk(file: BinaryIO) -> None:
    file.write(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_names_the_file_and_leaves_the_old_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_atomically(path, full_disk)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interruption_leaves_no_half_file(tmp_path: Path, error: type[BaseException]) -> None:
    def write(file: BinaryIO) -> None:
        file.write(b"half")
        raise error

    with pytest.raises(error):
        write_atomically(tmp_path / "a.bin", write)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_device_is_written_directly_and_stays_a_device() -> None:
    device = Path("/dev/full")
    check_writable(device)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_json(device, [1])
    assert caught.value.filename == "/dev/full"
    assert device.is_char_device()


def test_permissions_are_those_of_an_ordinary_new_file(tmp_path: Path) -> None:
    ordinary = tmp_path / "ordinary"
    ordinary.write_bytes(b"")
    write_atomically(tmp_path / "ours", lambda file: file.write(b""))
    assert (tmp_path / "ours").stat().st_mode == ordinary.stat().st_mode


def test_json_is_readable_and_never_holds_nan(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": [1, None, "ô"]})
    assert json.loads(path.read_text()) == {"a": [1, None, "ô"]}
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": [1, None, "ô"]}


def test_checking_makes_the_folder_and_touches_no_file(tmp_path: Path) -> None:
    new = tmp_path / "deep" / "folder" / "a.json"
    check_writable(new)
    assert list(new.parent.iterdir()) == []
    new.write_text("old")
    check_writable(new)
    assert new.read_text() == "old"


@pytest.mark.parametrize("where", ["folder", "file/below", "/proc/below/a.json"])
def test_a_path_that_cannot_be_written_is_known_before(tmp_path: Path, where: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    path = tmp_path / where
    with pytest.raises(OSError, match=r"directory|denied|permitted|exists") as caught:
        check_writable(path)
    assert caught.value.filename == str(path)


def test_a_folder_appears_when_all_of_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "saved"
    with new_folder(path) as partial:
        (partial / "a").write_text("1")
        assert not path.exists()
        assert partial.parent == path.parent
    assert [file.name for file in path.iterdir()] == ["a"]
    assert list(path.parent.iterdir()) == [path]
    ordinary = tmp_path / "ordinary"
    ordinary.mkdir()
    assert path.stat().st_mode == ordinary.stat().st_mode


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_folder_that_was_not_finished_is_not_there(tmp_path: Path, error: type[BaseException]) -> None:
    def broken(path: Path) -> None:
        with new_folder(path) as partial:
            (partial / "a").write_text("1")
            raise error

    (tmp_path / "empty").mkdir()
    for name in ("saved", "empty"):
        with pytest.raises(error):
            broken(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    assert list((tmp_path / "empty").iterdir()) == []


def test_an_empty_folder_is_taken_and_anything_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as partial:
        (partial / "a").write_text("1")
    for path, got in ((tmp_path / "empty", "files in it"), (tmp_path / "empty" / "a", "a file")):
        with pytest.raises(FormatError, match=f"{path.name}: expected a new or an empty folder, got {got}"):
            with new_folder(path):
                raise AssertionError
    assert (tmp_path / "empty" / "a").read_text() == "1"


def test_a_link_to_an_empty_folder_leads_to_the_one_that_is_filled(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with new_folder(tmp_path / "link") as partial:
        (partial / "a").write_text("1")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "a").read_text() == "1"


def test_a_folder_that_cannot_be_replaced_is_known_before_the_work(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "volume")
    with pytest.raises(FormatError, match=r"got one where a disk is mounted.*volume/model"):
        with new_folder(tmp_path / "volume"):
            raise AssertionError
