"""Files that are written whole or not at all, and folders of finished work that an interrupted job resumes."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import secrets
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, BinaryIO, Self

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from modiff.errors import ConfigError, FormatError, PathError, StateError

if TYPE_CHECKING:
    from torch import Tensor

LOCK = ".lock"
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMG])(i?)B", re.IGNORECASE)
_DAMAGE = (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, ImportError, EOFError,
           SafetensorError, zipfile.BadZipFile, pickle.UnpicklingError)  # fmt: skip
_PARTIAL = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Call `write` with a binary file that replaces `path` once all of it is on disk; missing folders are made.

    Pipes and devices such as /dev/stdout are written directly: they cannot be replaced.
    Raises: PathError that names `path`; whatever `write` raises. The old file is then intact, and no other one is left.
    """
    path = path_of(path)
    with _errors_name(path):
        if path.exists() and not path.is_file() and not path.is_dir():
            with path.open("wb") as file:
                write(file)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial(path)
        try:
            with partial.open("xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. Raises: OSError; ValueError if it holds NaN or infinity."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


@contextmanager
def reading(path: str | Path, what: str, advice: str) -> Iterator[None]:
    """Turn what a missing or damaged file raises in the body into a FormatError: expected `what`, got ... `advice`."""
    try:
        yield
    except FormatError:
        raise
    except _DAMAGE as error:
        reason = shorten(str(error).partition("\n")[0], 160, placeholder=" ...") or "no reason given"
        got = getattr(error, "strerror", None) or f"{type(error).__name__}: {reason}"
        raise FormatError(f"{path}: expected {what}, got {got}. The file is missing or damaged. {advice}") from error


def read_json(path: str | Path, what: str, advice: str) -> dict[str, Any]:
    """The JSON object in a file. Raises: FormatError, see `reading`, also for something other than an object."""
    with reading(path, what, advice):
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise TypeError(f"a JSON {type(value).__name__}")
        return value


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    """Write tensors, and `facts` as metadata, atomically. Raises: OSError. Cost: a copy of the tensors in memory."""
    from safetensors.torch import save  # imported late: it loads torch

    content = save({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, metadata=dict(facts))
    write_atomically(path, lambda file: file.write(content))


def read_tensors(path: str | Path, what: str, advice: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file. Raises: FormatError, see `reading`."""
    with reading(path, what, advice), safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to write into that becomes `path` when the body is done; nothing is left of it when the body raises.

    Raises: FormatError if `path` is a file, holds files, or is where a disk is mounted: nothing is lost; OSError.
    """
    path = path_of(path)
    with _errors_name(path):
        path = path.resolve()  # a link to an empty folder stays a link to the one that is filled
        taken = path.exists() and not (path.is_dir() and not any(path.iterdir()))
    if taken:
        got = "files in it" if path.is_dir() else "a file"
        raise FormatError(f"{path}: expected a new or an empty folder, got {got}. Two checkpoints must not mix. "
                          "Give another name, or delete it.")  # fmt: skip
    if os.path.ismount(path):
        raise FormatError(f"{path}: expected a folder that can be replaced, got one where a disk is mounted. All files "
                          f"appear at once, by a rename. Give a folder inside, such as {path / 'model'}.")  # fmt: skip
    partial = _partial(path)
    with _errors_name(path):
        partial.mkdir(parents=True)
    try:
        yield partial
        with _errors_name(path):
            partial.replace(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_writable(path: str | Path) -> None:
    """Raise a PathError that names the path if it cannot be written later. Nothing is left of the trial."""
    path = path_of(path)
    with _errors_name(path):
        missing = [folder for folder in path.parents if not folder.exists()]
    try:
        with _errors_name(path):
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists() or path.is_file():
                with tempfile.TemporaryFile(dir=path.parent):
                    pass
            if path.exists():
                path.open("ab").close()
    finally:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()


class ResumableFolder:
    """A folder of finished items that belongs to one job: run the job again, and it goes on where it was killed.

    On entry the folder is made, locked against other processes, and claimed: a new one gets the job as a JSON file,
    an old one must hold the same job. What a killed process left half-written, here and one folder deeper, is removed.

    Args:
        job: what decides the content of the items, as JSON values; not what may grow, such as the number of items.
        record: the name of the JSON file. items: a pattern for the names of the items.
    Raises (on entry): ConfigError for a folder of another job (it names the settings that differ), or with items and
        no record; FormatError for a damaged record; StateError if another process works in the folder; OSError.
    """

    def __init__(self, path: str | Path, job: Mapping[str, Any], *, record: str = "job.json", items: str = "*") -> None:
        self.path = path_of(path)
        self.job: dict[str, Any] = json.loads(json.dumps(job, allow_nan=False))
        self._record, self._items, self._lock = self.path / record, items, FileLock(self.path / LOCK)

    def __enter__(self) -> Self:
        with _errors_name(self.path):
            self._check()  # before the lock, so that nothing is left in a folder of someone else
            self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
            self._check()
            if not self._record.exists():
                write_json(self._record, self.job)
            for partial in (*self.path.glob(".*.tmp"), *self.path.glob("*/.*.tmp")):
                if _PARTIAL.fullmatch(partial.name):
                    partial.unlink()
        except Timeout as error:
            raise StateError(f"{self.path}: expected a folder that no other process writes to, got one in use. Two "
                             "would do the same work. Wait, or give another folder.") from error  # fmt: skip
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    def finished(self) -> list[Path]:
        """The items that are there, sorted by name."""
        paths = self.path.glob(self._items) if self.path.is_dir() else ()
        return sorted(path for path in paths if path != self._record and not path.name.startswith("."))

    def _check(self) -> None:
        if self._record.exists():
            past = read_json(self._record, "the settings of a job", "Give another folder, or delete this one.")
            if differing := [*_differences(past, self.job)]:
                raise ConfigError(f"{self.path}: expected a folder of the same job, got one with another "
                                  f"{' and '.join(differing)}. Two jobs must not mix. Give another folder, or the "
                                  f"settings in its {self._record.name}.")  # fmt: skip
        elif items := self.finished():
            raise ConfigError(f"{self.path}: expected a new folder or one with {self._record.name}, got "
                              f"{items[0].name} alone. Nothing says whose it is. Give another folder.")  # fmt: skip


def _differences(past: Mapping[str, Any], job: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key in sorted({*past, *job}):
        old, new = past.get(key), job.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            yield prefix + key


@contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except PathError:
        raise
    except OSError as error:
        advice = "Free some space, or give" if error.errno == errno.ENOSPC else "Give"
        failed = PathError(f"{path}: expected a file that can be written, got {error.strerror or error}. Nothing was "
                           f"left half done. {advice} another path.")  # fmt: skip
        failed.errno, failed.filename = error.errno, str(path)
        raise failed from error


def path_of(path: str | Path) -> Path:
    """What a user gives as the name of a file or folder to write. Raises: ConfigError if it is no name."""
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise ConfigError(f"path: expected the name of a file or folder, got {path!r}. There is nowhere to write. Use "
                          "a name such as 'out'.")  # fmt: skip
    return Path(text)


def _partial(path: Path) -> Path:
    """A new name in the same folder. Files and folders made with open and mkdir get the user's permissions."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def bytes_of(size: int | str, where: str = "max_shard_size") -> int:
    """A number of bytes from what a person types: 1000, "5GB", "1.5GiB". Raises: ConfigError for anything else."""
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    if match is None:
        raise ConfigError(f"{where}: expected bytes or a text such as '200MB', got {size!r}. Use '5GB'.")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** (1 + "KMG".index(match[2].upper())))
