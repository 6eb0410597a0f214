"""The compiled half of the kernels: C++ with a C interface, built at first use with the compiler at hand.

No torch headers, so the build takes a second or two and fits every torch. Without a compiler everything still runs, on
torch's own operators, and `load_library().reason` says what was missing.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modiff.errors import warn_once
from modiff.kernels.isa import detect

SWITCH = "MODIFF_NATIVE"
"""Environment variable; "off" never compiles."""
CACHE = "MODIFF_CACHE"
"""Environment variable: folder for compiled libraries, instead of the user's cache folder."""

BLOCK = 16384
"""Elements that one task of the compiled loops works on."""
KINDS = {torch.float32: 0, torch.bfloat16: 1}
"""The types of inputs and outputs that the compiled loops know, as C++ numbers them."""

_SOURCES = Path(__file__).parent / "csrc"
_SECONDS = 120
_FLAGS = (
    *("-O3", "-std=c++17", "-shared", "-fPIC", f"-DMODIFF_BLOCK={BLOCK}"),
    "-ffp-contract=off",  # a fused multiply-add would give other codes than torch
    *("-fno-math-errno", "-fno-trapping-math"),  # they let rounding be vectorized
)
_ATTEMPTS = (("-march=native", "-fopenmp"), ("-march=native",), ())
_WITHOUT = {
    "avx512": ("-mno-avx512vnni", "-mno-avxvnni"),
    "avx2_vnni": ("-mno-avx512f",),
    "avx2": ("-mno-avx512f", "-mno-avxvnni"),
    "sse41": ("-mno-avx",),
}
"""By level, what the compiler leaves out where oneDNN's limit hides the rest of the processor."""

_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float
_SCALING = [_L, _I, _F, _F, _I, _I, _I]  # samples, dynamic, factor, unsent, lowest, highest, threads
_SIGNATURES: dict[str, dict[str, list[Any]]] = {
    "encode": {
        "modiff_encode": [_P, _I, *[_P] * 8, _L, _L, *_SCALING],
        "modiff_start": [_P, _I, _L, _F, _P, _P, _I],
    },
    "fingerprint": {"modiff_fingerprint": [_P, _L, _I]},
    "product": {
        "modiff_family": [],
        "modiff_outputs": [],
        "modiff_product": [_P, _P, _I, _I, _P, _L, _P, _I, _I, *[_P] * 6, _L, _P, _P, _I, _I],
    },
    "epilogue": {"modiff_epilogue": [*[_P] * 5, _I, _P, _L, _L, _I]},
    "input_fusion": {
        "modiff_moments": [_P, _I, _L, _L, _F, _P, _P, _I],
        "modiff_group_affine": [_P, _I, *[_L] * 4, _F, _L, _P, _P, _I, _P, _P, _I],
        "modiff_encode_fused": [_P, _I, _I, _I, *[_P] * 12, *[_L] * 6, *_SCALING],
    },
}

_RESULTS: dict[str, Any] = {
    "modiff_fingerprint": ctypes.c_uint64,
    **dict.fromkeys(("modiff_family", "modiff_outputs", "modiff_encode", "modiff_encode_fused"), _I),
}


class Native(NamedTuple):
    """The compiled library, or None and why there is none."""

    library: ctypes.CDLL | None
    reason: str


@functools.cache
def load_library(name: str = "encode") -> Native:
    """Build or find the library of `csrc/<name>.cpp`; asked once per process."""
    if os.environ.get(SWITCH, "").lower() in ("off", "0", "no"):
        return Native(None, f"switched off by {SWITCH}")
    compiler = find_compiler()
    if compiler is None:
        return Native(None, "no C++ compiler on the PATH. Install g++ or clang++, or name one in CXX")
    try:
        path = _built(compiler, name)
        try:
            library = _open(path, name)
        except OSError:  # cut while it was written or copied
            path.unlink()
            library = _open(_built(compiler, name), name)
        return Native(library, f"compiled with {Path(compiler).name}")
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        return Native(None, f"{Path(compiler).name} could not build it: {detail.strip().splitlines()[0]}")


def missing(name: str) -> None:
    """Warn once that layers take longer without the library of `csrc/<name>.cpp`, unless it was switched off."""
    reason = load_library(name).reason
    if not reason.startswith("switched off"):
        warn_once(
            reason,
            "modiff: integer layers run on torch's own operators, several passes over memory instead of one or two: "
            f"{reason}.",
        )


def find_compiler() -> str | None:
    """The C++ compiler that CXX names, or the first of the usual ones."""
    chosen = os.environ.get("CXX")
    names = [chosen] if chosen else ["c++", "g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def cache_folder() -> Path:
    """Where compiled libraries are kept between processes."""
    if chosen := os.environ.get(CACHE):
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modiff"
    except RuntimeError:  # neither HOME nor an entry among the users
        return Path(tempfile.gettempdir()) / f"modiff-{os.getuid()}"


def _built(compiler: str, name: str) -> Path:
    source = _SOURCES / f"{name}.cpp"
    command = [compiler, "--version"]
    version = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=True).stdout
    machine = (sorted(torch.cpu.get_capabilities().items()), detect().level)
    digest = hashlib.sha256(repr((_FLAGS, _ATTEMPTS, version, machine)).encode())
    for file in (source, *sorted(_SOURCES.glob("*.h"))):
        digest.update(file.read_bytes())
    library = f"{name}-{digest.hexdigest()[:20]}.so"
    folder = cache_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _refuse_foreign(folder)
        if (folder / library).exists():
            return folder / library
        return _build(compiler, source, folder / library)
    except OSError as error:  # read-only, full, no folder at all, or another user's
        warn_once(
            str(folder),
            f"modiff: compiled loops are kept for this process alone, in a temporary folder: {error}. Set {CACHE} to a "
            "folder of yours.",
        )
        return _build(compiler, source, Path(tempfile.mkdtemp(prefix="modiff-")) / library)


def _refuse_foreign(folder: Path) -> None:
    """Raises: OSError for a folder in the temporary one that others made or may write: its libraries would run here."""
    status = folder.lstat()
    if folder.parent != Path(tempfile.gettempdir()) or not hasattr(os, "getuid"):
        return
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder} belongs to user {status.st_uid} with mode {stat.S_IMODE(status.st_mode):o}")


def _build(compiler: str, source: Path, target: Path) -> Path:
    """Compile next to the target and move it there whole: processes that build at once do not disturb each other."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / "built.so"
        for extra in _ATTEMPTS:
            fewer = _WITHOUT.get(detect().level, ()) if "-march=native" in extra else ()
            command = [compiler, *_FLAGS, *extra, *fewer, str(source), "-o", str(made)]
            last = extra == _ATTEMPTS[-1]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=last)
            if done.returncode == 0:
                break
        made.replace(target)
    return target


def _open(path: Path, name: str) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for function, arguments in _SIGNATURES[name].items():
        entry = getattr(library, function)
        entry.argtypes, entry.restype = arguments, _RESULTS.get(function)
    return library


Fingerprint = tuple[int, torch.dtype, torch.Size, tuple[int, ...]]
"""A number for the bytes, and how they are to be read."""


def fingerprint(x: Tensor) -> Fingerprint | None:
    """What changes with any element of x, but for one chance in 2^64. Cost: one pass over x.

    None for a tensor that is empty, not on the CPU or not dense, and on a machine without a C++ compiler.
    """
    known = x.device.type == "cpu" and x.layout == torch.strided and x.data_ptr() != 0
    dense = known and torch.ops.aten.is_non_overlapping_and_dense(x)
    if not dense or (library := load_library("fingerprint").library) is None:
        return None
    number = library.modiff_fingerprint(x.data_ptr(), x.numel() * x.element_size(), torch.get_num_threads())
    return number, x.dtype, x.shape, x.stride()
