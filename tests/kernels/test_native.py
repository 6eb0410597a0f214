"""Building the compiled library: found again, switched off, without a compiler, with a broken one."""

from __future__ import annotations

import os
import stat
import tempfile
import warnings
from pathlib import Path

import pytest
import torch

from modiff import ModiffWarning, errors
from modiff.kernels import native
from modiff.kernels.encode import encode_input
from modiff.kernels.input_fusion import InputFusion

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


def test_a_layer_that_misses_the_compiled_loops_warns_once_and_one_that_asks_for_a_fingerprint_does_not(monkeypatch):
    monkeypatch.setattr(errors, "_WARNED", set())
    monkeypatch.setattr(native, "find_compiler", lambda: None)
    x = torch.randn(4, 8)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert native.fingerprint(x) is None
        assert not seen
        for _ in range(2):
            encode_input(x, None, 8)
            InputFusion("layer", eps=1e-5).encode(x, None, None, 8)
    assert [w.category for w in seen] == [ModiffWarning]
    assert "several passes over memory" in str(seen[0].message)
    assert "Install g++ or clang++" in str(seen[0].message)


def test_who_switched_the_loops_off_is_not_warned(monkeypatch):
    monkeypatch.setattr(errors, "_WARNED", set())
    monkeypatch.setenv(native.SWITCH, "off")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode_input(torch.randn(4, 8), None, 8)


@pytest.fixture
def homeless(monkeypatch, tmp_path):
    """No cache folder but the one among everybody's temporary files, which is `tmp_path`."""
    for name in (native.CACHE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", raising_home)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(errors, "_WARNED", set())
    return native.cache_folder()


def raising_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


@needs_compiler
def test_a_folder_among_temporary_files_is_made_for_its_owner_alone(homeless):
    assert native.load("fingerprint").library is not None
    assert stat.S_IMODE(homeless.stat().st_mode) == 0o700
    assert len(list(homeless.iterdir())) == 1


@needs_compiler
@pytest.mark.parametrize("trap", ["another user's", "open to others", "a link"])
def test_a_library_of_somebody_else_is_never_loaded(trap, homeless, monkeypatch, tmp_path):
    """Red before: whoever made the folder first chose what ran in the process of another user."""
    native.load("fingerprint")
    (planted,) = homeless.iterdir()
    planted.write_bytes(b"not what was compiled")
    if trap == "another user's":
        someone = homeless.stat().st_uid + 1
        monkeypatch.setattr(os, "getuid", lambda: someone)
        homeless.rename(native.cache_folder())
    elif trap == "open to others":
        homeless.chmod(0o770)
    else:
        homeless.rename(tmp_path / "elsewhere")
        homeless.symlink_to(tmp_path / "elsewhere")
    native.load.cache_clear()
    with pytest.warns(ModiffWarning, match="belongs to user .* with mode .* Set MODIFF_CACHE") as seen:
        assert native.load("fingerprint").library is not None
    assert len(seen) == 1


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


def test_the_cache_folder_follows_the_user_s_settings(monkeypatch, tmp_path):
    assert native.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv(native.CACHE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert native.cache_folder() == tmp_path / "xdg" / "modiff"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert native.cache_folder() == tmp_path / ".cache" / "modiff"
