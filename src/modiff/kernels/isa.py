"""Which integer instructions this process may use, as a record that tests can make up."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Literal, NamedTuple

import torch

Level = Literal["amx", "avx512_vnni", "avx2_vnni", "avx512", "avx2", "sse41", "other"]

LIMIT = "ONEDNN_MAX_CPU_ISA"
"""oneDNN's own variable; it is read once, when oneDNN first runs."""

_LEVELS: tuple[Level, ...] = ("amx", "avx512_vnni", "avx2_vnni", "avx512", "avx2", "sse41")
_LIMITS: dict[str, tuple[Level, ...]] = {
    "SSE41": ("sse41",),
    "AVX": ("sse41",),
    "AVX2": ("avx2", "sse41"),
    "AVX2_VNNI": ("avx2_vnni", "avx2", "sse41"),
    "AVX2_VNNI_2": ("avx2_vnni", "avx2", "sse41"),
    "AVX512_CORE": ("avx512", "avx2", "sse41"),
}
_NO_AMX = ("AVX512_CORE_VNNI", "AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512")


class Trust(NamedTuple):
    """What oneDNN's self-test showed: right where no pair of products can saturate 16 bits, and right for all codes."""

    bounded: bool = True
    full: bool = True
    detail: str = ""


class Isa(NamedTuple):
    """What the processor and oneDNN's limit leave.

    level: the best integer instructions. onednn: whether this torch holds oneDNN's integer operators.
    trust: what its self-test showed; by default oneDNN is taken at its word.
    """

    level: Level
    onednn: bool = True
    trust: Trust = Trust()

    @property
    def sums_in_int32(self) -> bool:
        """Whether u8 x s8 products are summed in 32 bits. Without VNNI pairs are summed in int16, which saturates."""
        return self.level in ("amx", "avx512_vnni", "avx2_vnni")


def level_of(capable: dict[str, object], limit: str = "") -> Level:
    """The best level that a processor with these capabilities reaches under a limit of oneDNN ("": no limit).

    >>> level_of({"avx2": True, "avx512_f": True, "avx512_vnni": True}, "AVX2")
    'avx2'
    """
    has: dict[Level, bool] = {
        "amx": bool(capable.get("amx_int8")),
        "avx512_vnni": bool(capable.get("avx512_vnni")),
        "avx2_vnni": bool(capable.get("avx_vnni")) and bool(capable.get("avx2")),
        "avx512": bool(capable.get("avx512_f")) and bool(capable.get("avx512_bw")),
        "avx2": bool(capable.get("avx2")),
        "sse41": bool(capable.get("sse4_1")),
    }
    allowed = _allowed(limit.strip().upper())
    levels: list[Level] = [level for level in _LEVELS if has[level] and level in allowed]
    return levels[0] if levels else "other"


def _allowed(limit: str) -> tuple[Level, ...]:
    if limit in _LIMITS:
        return _LIMITS[limit]
    if limit in _NO_AMX:
        return _LEVELS[1:]
    return _LEVELS


def capabilities() -> dict[str, object]:
    """What torch knows of the processor; an older one answers several questions instead of one."""
    probe = getattr(torch.cpu, "get_capabilities", None)
    if probe is not None:
        return dict(probe())
    vnni, avx512, avx2 = "_is_vnni_supported", "_is_avx512_supported", "_is_avx2_supported"
    probes = {"amx_int8": "_is_amx_tile_supported", "avx512_vnni": vnni, "avx512_f": avx512, "avx512_bw": avx512}
    return {name: getattr(torch.cpu, ask, bool)() for name, ask in {**probes, "avx2": avx2, "sse4_1": avx2}.items()}


def detect() -> Isa:
    """The record of this process, the self-test left out."""
    onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise")
    return Isa(level_of(capabilities(), os.environ.get(LIMIT, "")), onednn)


def processor() -> str:
    """The processor's marketing name where the system tells it, else its architecture."""
    table = Path("/proc/cpuinfo")
    if table.is_file():
        for line in table.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def machine() -> str:
    """What times depend on: processor, instructions, threads and torch."""
    return f"{processor()}, {detect().level}, {torch.get_num_threads()} threads, torch {torch.__version__}"
