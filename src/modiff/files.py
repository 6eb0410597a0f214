"""Write files whole or not at all: a full disk or Ctrl-C leaves the old file as it was."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from modiff.errors import FormatError


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Call `write` with a binary file that replaces `path` only when all of it is on disk.

    Pipes and devices such as /dev/stdout are written directly: they cannot be replaced.
    Raises: OSError that names `path`; whatever `write` raises. The old file is whole then, and no other one is left.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            with path.open("wb") as file:
                write(file)
            return
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        partial = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            partial.chmod(0o666 & ~_umask())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise type(error)(error.errno, error.strerror or str(error), str(path)) from error


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. Raises: OSError; ValueError if it holds NaN or infinity."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to write into that becomes `path` only when the body is done; nothing is left of it when it raises.

    Raises: FormatError if `path` is a file or a folder that holds something: nothing is ever overwritten; or where a
        disk is mounted at `path`, which nothing can be moved onto; OSError.
    """
    path = Path(path).resolve()  # a link to an empty folder stays a link to the one that is filled
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        got = "files in it" if path.is_dir() else "a file"
        raise FormatError(f"{path}: expected a new or an empty folder, got {got}. Two checkpoints must not mix. "
                          "Give another name, or delete it.")  # fmt: skip
    if os.path.ismount(path):
        raise FormatError(
            f"{path}: expected a folder that can be replaced, got one where a disk is mounted. All files appear at "
            f"once, by a rename. Give a folder inside, such as {path / 'model'}."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        yield partial
        partial.chmod(0o777 & ~_umask())
        partial.replace(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_writable(path: str | Path) -> None:
    """Make sure that `path` can be written later, and make its folder: to be asked before a long job, not after.

    Raises: OSError that names `path`, if it is a folder or lies where nothing can be written.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(21, "Is a directory")
        if path.exists() and not path.is_file():
            path.open("ab").close()
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.exists():
            path.open("ab").close()
    except OSError as error:
        raise type(error)(error.errno, error.strerror or str(error), str(path)) from error


def _umask() -> int:
    """The process's umask; reading it means setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
