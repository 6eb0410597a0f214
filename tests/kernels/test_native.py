"""Building the compiled loops: found again, switched off, without a compiler, with a broken one; and fingerprints."""

import os
import re
import stat
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modiff import ModiffWarning, errors
from modiff.kernels import native
from modiff.kernels.encode import encode_residual
from modiff.kernels.input_fusion import InputFusion
from modiff.kernels.layout import innermost
from modiff.kernels.native import fingerprint
from tests.kernels.problems import needs_compiler, on_threads

NAME = "fingerprint"
"""The library that is built fastest."""


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A process that has not asked yet and was not warned, with an empty cache folder."""
    native.load_library.cache_clear()
    monkeypatch.setenv(native.CACHE, str(tmp_path / "cache"))
    monkeypatch.delenv(native.SWITCH, raising=False)
    monkeypatch.setattr(errors, "_WARNED", set())
    yield tmp_path / "cache"
    native.load_library.cache_clear()


def script(folder: Path, text: str) -> str:
    path = folder / "compiler"
    path.write_text(f'#!/bin/sh\ncase "$*" in *--version*) echo 1;; {text};; esac\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@needs_compiler
def test_a_library_is_built_once_and_found_by_the_next_process_also_without_openmp(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", script(tmp_path, f'*-fopenmp*) exit 1;; *) exec {native.find_compiler()} "$@"'))
    assert "compiled with" in native.load_library(NAME).reason
    ((path, built),) = [(file, file.stat().st_mtime_ns) for file in cache.iterdir()]
    native.load_library.cache_clear()
    assert native.load_library(NAME).library is not None
    assert [(file, file.stat().st_mtime_ns) for file in cache.iterdir()] == [(path, built)]


@needs_compiler
def test_a_library_that_was_cut_is_built_again(cache):
    path = native._built(native.find_compiler(), NAME)
    path.write_bytes(path.read_bytes()[:100])
    assert native.load_library(NAME).library is not None
    assert path.stat().st_size > 100


@pytest.mark.parametrize("value", ["OFF", "0"])
def test_it_can_be_switched_off_and_then_nobody_is_warned(value, cache, monkeypatch):
    monkeypatch.setenv(native.SWITCH, value)
    assert native.load_library(NAME) == (None, "switched off by MODIFF_NATIVE")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode_residual(torch.randn(4, 8), None, None, 8)


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        (None, "no C++ compiler on the PATH. Install g++ or clang++, or name one in CXX"),
        ('*) echo "no headers" >&2; exit 1', "compiler could not build it: no headers"),
        ('*) while [ "$1" != -o ]; do shift; done; echo text > "$2"', "compiler could not build it: "),
    ],
)
def test_without_a_working_compiler_the_reason_says_what_is_missing(compiler, reason, cache, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path) if compiler is None else os.environ["PATH"])
    monkeypatch.delenv("CXX", raising=False)
    if compiler is not None:
        monkeypatch.setenv("CXX", script(tmp_path, compiler))
    library, said = native.load_library(NAME)
    assert library is None
    assert said.startswith(reason)


def test_a_layer_that_misses_the_loops_warns_once_and_one_that_asks_for_a_fingerprint_does_not(cache, monkeypatch):
    monkeypatch.setattr(native, "find_compiler", lambda: None)
    x = torch.randn(4, 8)
    assert fingerprint(x) is None
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            encode_residual(x, None, None, 8)
            InputFusion("layer", eps=1e-5).encode(x, None, None, 8)
    assert [warning.category for warning in seen] == [ModiffWarning]
    assert re.search(r"several passes over memory.*Install g\+\+ or clang\+\+", str(seen[0].message))


@pytest.fixture
def homeless(cache, monkeypatch, tmp_path) -> Path:
    """The cache folder of a user without a home: among everybody's temporary files, which are in `tmp_path`."""

    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in (native.CACHE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", none)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return native.cache_folder()


@needs_compiler
@pytest.mark.parametrize("trap", ["another user's", "open to others", "a link", "a file"])
def test_without_a_home_a_folder_is_made_for_its_owner_and_a_library_of_somebody_else_never_loaded(
    trap, homeless, monkeypatch, tmp_path
):
    assert native.load_library(NAME).library is not None
    assert stat.S_IMODE(homeless.stat().st_mode) == 0o700
    (planted,) = homeless.iterdir()
    planted.unlink()  # written over in place, the library that this process has loaded would crash at its end
    planted.write_bytes(b"not what was compiled")
    if trap == "another user's":
        someone = homeless.stat().st_uid + 1
        monkeypatch.setattr(os, "getuid", lambda: someone)
        homeless.rename(native.cache_folder())
    elif trap == "open to others":
        homeless.chmod(0o770)
    else:
        homeless.rename(tmp_path / "elsewhere")
        homeless.touch() if trap == "a file" else homeless.symlink_to(tmp_path / "elsewhere")
    native.load_library.cache_clear()
    why = r"for this process alone, in a temporary folder: .*(user .* with mode|File exists).* Set MODIFF_CACHE"
    with pytest.warns(ModiffWarning, match=why) as seen:
        assert native.load_library(NAME).library is not None
    assert len(seen) == 1


BLOCK = 1 << 18
"""Bytes that the fingerprint sums on their own."""


def of(x: Tensor) -> int:
    number = fingerprint(x)
    assert number is not None
    return number[0]


def some(count: int) -> Tensor:
    return torch.randint(-128, 128, (count,), generator=torch.Generator().manual_seed(0), dtype=torch.int8)


@needs_compiler
@given(
    count=st.one_of(st.integers(2, 300), st.sampled_from([BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 77])),
    bit=st.sampled_from([1, 2, 4, 8, 16, 32, 64, -128]), data=st.data(),
)  # fmt: skip
def test_every_bit_and_every_place_counts(count, bit, data):
    x = some(count)
    a, b = (data.draw(st.integers(0, count - 1)) for _ in range(2))
    flipped, swapped = x.clone(), x.clone()
    flipped[a] ^= bit
    swapped[[a, b]] = x[[b, a]]
    assert of(flipped) != of(x)
    assert (of(swapped) != of(x)) == (x[a] != x[b])


@needs_compiler
@pytest.mark.parametrize("high", [0, 1, 2**32 - 1])
@pytest.mark.parametrize("low", [0, 1])
def test_a_bit_is_seen_where_the_key_leaves_next_to_nothing_of_the_product(high, low):
    key = 0xE220A8397B1DCDAF  # of the first word: splitmix64's first number
    halves = [key % 2**32 ^ (low * (2**32 - 1)), key >> 32 ^ high]
    x = torch.tensor(halves, dtype=torch.int64).to(torch.uint32).view(torch.int32)
    flips = torch.tensor([1 << bit if bit < 31 else -(1 << 31) for bit in range(32)], dtype=torch.int32)
    assert len({of(x), *(of(torch.stack([x[0] ^ flip, x[1]])) for flip in flips)}) == 33


@needs_compiler
def test_changes_that_cancel_in_a_sum_and_more_zeros_are_seen_and_threads_are_not():
    x, long = torch.randn(1024, generator=torch.Generator().manual_seed(1)), some(4 * BLOCK)
    assert len({of(y) for y in (x, -x, x.flip(0), x.roll(1), x.roll(16), x * 2, x.abs())}) == 7
    assert len({of(torch.zeros(n)) for n in (1, 2, 15, 16, 17, 1 << 16, (1 << 16) + 1)}) == 7
    assert of(long) != of(torch.cat([long[BLOCK : 2 * BLOCK], long[:BLOCK], long[2 * BLOCK :]]))
    for threads in (1, 2):
        with on_threads(threads):
            assert of(long) == of(long.clone())
    assert of(long[64:128]) == of(long[64:128].clone())  # nothing around it is read


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_the_dtype_and_the_order_in_memory_belong_to_it(dtype):
    x = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).to(dtype)
    inner, square = innermost(x.float()).to(dtype), torch.ones(4, 4).to(dtype)
    different = [x, inner, x.view(6, 20), x.view(torch.uint8), square, square.T]  # the last two hold the same bytes
    assert len({fingerprint(y) for y in different}) == 6
    assert fingerprint(inner) == fingerprint(inner.clone())
    for y in (x[:0], x[..., :3], x[:1].expand(2, 3, 4, 5), x.float().to_sparse(), x.to("meta")):  # nobody can tell
        assert fingerprint(y) is None
