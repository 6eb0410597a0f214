"""Building the compiled library: found again, switched off, without a compiler, with a broken one."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import pytest

from modiff.kernels import native

needs_compiler = pytest.mark.skipif(native.find_compiler() is None, reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A process that has not asked yet, with a cache of its own."""
    native.load.cache_clear()
    monkeypatch.setenv(native.CACHE, str(tmp_path / "cache"))
    monkeypatch.delenv(native.SWITCH, raising=False)
    yield
    native.load.cache_clear()


def script(folder: Path, text: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@needs_compiler
def test_a_library_is_built_once_and_found_by_the_next_process():
    first = native.load()
    assert first.library is not None
    assert "compiled with" in first.reason
    files = list(native.cache_folder().iterdir())
    assert len(files) == 1
    built = files[0].stat().st_mtime_ns
    native.load.cache_clear()
    assert native.load().library is not None
    assert [f.stat().st_mtime_ns for f in native.cache_folder().iterdir()] == [built]


@pytest.mark.parametrize("value", ["off", "OFF", "0", "no"])
def test_it_can_be_switched_off(monkeypatch, value):
    monkeypatch.setenv(native.SWITCH, value)
    assert native.load() == (None, "switched off by MODIFF_NATIVE")


def test_without_a_compiler_the_reason_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    found = native.load()
    assert found.library is None
    assert found.reason == "no C++ compiler on the PATH. Install g++ or clang++, or name one in CXX"


def test_a_compiler_that_fails_is_named_with_its_first_complaint(monkeypatch, tmp_path):
    monkeypatch.setenv(
        "CXX", script(tmp_path, 'case "$*" in *--version*) echo 1;; *) echo "no headers" >&2; exit 1;; esac')
    )
    found = native.load()
    assert found.library is None
    assert found.reason == "compiler could not build it: no headers"


def test_a_compiler_that_makes_no_library_is_noticed(monkeypatch, tmp_path):
    made = 'case "$*" in *--version*) echo 1;; *) while [ "$1" != -o ]; do shift; done; echo text > "$2";; esac'
    monkeypatch.setenv("CXX", script(tmp_path, made))
    found = native.load()
    assert found.library is None
    assert "could not build it" in found.reason


@needs_compiler
def test_a_compiler_without_openmp_still_builds(monkeypatch, tmp_path):
    real = native.find_compiler()
    refuses = f'case "$*" in *-fopenmp*) exit 1;; *) exec {real} "$@";; esac'
    monkeypatch.setenv("CXX", script(tmp_path, refuses))
    assert native.load().library is not None


@needs_compiler
@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else True, reason="root writes everywhere")
def test_a_cache_folder_that_cannot_be_written_is_replaced_for_this_process(monkeypatch, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    monkeypatch.setenv(native.CACHE, str(closed / "cache"))
    assert native.load().library is not None


@needs_compiler
def test_a_cache_folder_that_cannot_be_made_is_replaced_for_this_process(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv(native.CACHE, str(tmp_path / "file" / "cache"))
    assert native.load().library is not None


def test_without_a_home_the_cache_lies_among_the_temporary_files(monkeypatch):
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in (native.CACHE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", none)
    assert native.cache_folder().parent == Path(tempfile.gettempdir())


def test_the_cache_folder_follows_the_user_s_settings(monkeypatch, tmp_path):
    assert native.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv(native.CACHE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert native.cache_folder() == tmp_path / "xdg" / "modiff"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert native.cache_folder() == tmp_path / ".cache" / "modiff"
