"""Files and folders: whole or not there, the old one survives any failure, and an interrupted job resumes."""

import contextlib
import errno
import os
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from modiff.errors import ConfigError, FormatError, StateError
from modiff.files import (
    ResumableFolder,
    check_writable,
    new_folder,
    read_json,
    read_tensors,
    write_atomically,
    write_json,
    write_tensors,
)
from tests.kills import check_kills


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError()])
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, error: BaseException) -> None:
    def write(file: BinaryIO) -> None:
        file.write(b"half")
        raise error

    path = tmp_path / "deep" / "a.bin"
    write_atomically(path, lambda file: file.write(b"old"))
    with pytest.raises(type(error)) as caught:
        write_atomically(path, write)
    assert getattr(caught.value, "filename", str(path)) == str(path)
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_device_is_written_directly_and_stays_a_device() -> None:
    check_writable("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        write_json("/dev/full", [1])
    assert Path("/dev/full").is_char_device()


def test_permissions_are_those_of_ordinary_files_and_the_umask_is_never_set(tmp_path: Path, monkeypatch) -> None:
    # os.umask is the process's: setting it, even for a moment, opens the files that other threads make then
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask was set"))
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    write_atomically(tmp_path / "our file", lambda file: file.write(b""))
    with new_folder(tmp_path / "our folder"):
        pass
    modes = [(tmp_path / name).stat().st_mode for name in ("file", "our file", "folder", "our folder")]
    assert (modes[0], modes[2]) == (modes[1], modes[3])


def test_json_and_tensors_come_back_and_damage_is_told_in_one_line(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [1, None, "ô"]})
    assert read_json(tmp_path / "a.json", "settings", "") == {"a": [1, None, "ô"]}
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    tensors = {"x": torch.arange(6).reshape(2, 3).T}
    write_tensors(tmp_path / "a.st", tensors, {"format": "test"})
    loaded, facts = read_tensors(tmp_path / "a.st", "tensors", "")
    assert torch.equal(loaded["x"], tensors["x"])
    assert facts == {"format": "test"}
    for read, name in ((read_json, "a.json"), (read_tensors, "a.st")):
        whole = (tmp_path / name).read_bytes()
        for damaged in (b"", b"[1]", b"[" * 100_000, whole[: len(whole) // 2], b"\xff" + whole, None):
            (tmp_path / name).unlink() if damaged is None else (tmp_path / name).write_bytes(damaged)
            with pytest.raises(FormatError, match=f"{name}: expected it, got [^\n]* missing or damaged. Do that.$"):
                read(tmp_path / name, "it", "Do that.")


@pytest.mark.parametrize("where", ["folder", "file/below", "/proc/below/a.json"])
def test_a_path_that_cannot_be_written_is_known_before(tmp_path: Path, where: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    with pytest.raises(OSError, match=r"directory|denied|permitted|exists") as caught:
        check_writable(tmp_path / where)
    assert caught.value.filename == str(tmp_path / where)
    check_writable(tmp_path / "new" / "a.json")
    check_writable(tmp_path / "file")
    check_writable(tmp_path / "other" / "folder" / "a.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, OSError])
def test_a_folder_appears_when_all_of_it_is_written(tmp_path: Path, error: type[BaseException] | None) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")  # a link to an empty folder leads to the one that is filled
    for path in (tmp_path / "link", tmp_path / "new"):
        with pytest.raises(error) if error else contextlib.nullcontext(), new_folder(path) as partial:
            (partial / "a").write_text("1")
            assert not path.exists() or not any(path.iterdir())
            if error:
                raise error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"] + ["new"] * (not error)
    assert [path.name for path in (tmp_path / "link").iterdir()] == ["a"] * (not error)


def test_nothing_that_is_there_becomes_a_new_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "volume")
    for name in ("full", "volume"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "a").write_text("1")
    for name, got in (("full", "files in it"), ("full/a", "a file"), ("volume", "one where a disk is mounted")):
        with pytest.raises(FormatError, match=f"{name}: expected a .*, got {got}"), new_folder(tmp_path / name):
            pytest.fail("the body ran")


JOB = {"seed": 0, "config": {"bits": 4, "steps": (1, 2)}, "prompt": None}


def work(path: Path) -> None:
    with ResumableFolder(path, JOB, items="*.json") as folder:
        for index in range(3):
            if folder.path / f"{index}.json" not in folder.finished():
                write_json(folder.path / f"{index}.json", {"index": index})


def test_a_job_resumes_after_a_kill_at_any_file_operation(tmp_path: Path) -> None:
    check_kills("tests.test_files:work", tmp_path, at_least=9)


def test_a_folder_keeps_its_job_and_names_each_setting_of_another(tmp_path: Path) -> None:
    work(tmp_path)
    (tmp_path / "0.json").write_text("{}")
    work(tmp_path)
    assert (tmp_path / "0.json").read_text() == "{}"
    other = {"seed": 1, "config": {"bits": 8, "steps": [1, 2]}}
    with pytest.raises(ConfigError, match=r"expected a folder of the same job, got .* another config\.bits and seed\."):
        ResumableFolder(tmp_path, other).__enter__()
    (tmp_path / "job.json").unlink()
    with pytest.raises(ConfigError, match=r"expected a new folder or one with job\.json, got 0\.json"):
        work(tmp_path)
    with ResumableFolder(tmp_path, JOB, items="*.npz") as folder:  # no items of this job: files that may stay
        assert folder.finished() == []
    (tmp_path / "job.json").write_text("{")
    with pytest.raises(FormatError, match=r"job\.json: expected the settings of a job"):
        work(tmp_path)


def test_a_second_job_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    with ResumableFolder(tmp_path, JOB, items="*.json"):  # a lock of another thread is one of another process
        with pytest.raises(StateError, match="expected a folder that no other process writes to, got one in use"):
            work(tmp_path)
    work(tmp_path)
    assert read_json(tmp_path / "2.json", "", "") == {"index": 2}


@pytest.mark.parametrize("path", ["", " ", "a\0b", None, 3])
def test_what_is_no_name_of_a_file_or_folder_is_one_line(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for write in (lambda: write_json(path, {}), lambda: check_writable(path), lambda: ResumableFolder(path, {}),
                  lambda: new_folder(path).__enter__()):  # fmt: skip
        with pytest.raises(ConfigError, match=r"path: expected the name of a file or folder, got .*Use a name such as"):
            write()
    assert not any(tmp_path.iterdir())
