"""Which integer instructions this process may use, as a record that tests can make up."""

import os
import platform
from pathlib import Path
from typing import Literal, NamedTuple

import torch

Level = Literal["amx", "avx512_vnni", "avx2_vnni", "avx512", "avx2", "sse41", "other"]

LIMIT = "ONEDNN_MAX_CPU_ISA"
"""oneDNN's own variable; it is read once, when oneDNN first runs."""

_LEVELS: dict[Level, tuple[str, ...]] = {
    "amx": ("amx_int8",),
    "avx512_vnni": ("avx512_vnni",),
    "avx512": ("avx512_f", "avx512_bw"),
    "avx2_vnni": ("avx_vnni", "avx2"),
    "avx2": ("avx2",),
    "sse41": ("sse4_1",),
}
"""The capabilities that make a level, in the order in which oneDNN prefers them."""
_LIMITS: dict[str, Level] = {
    **dict.fromkeys(("SSE41", "AVX"), "sse41"),
    "AVX2": "avx2",
    **dict.fromkeys(("AVX2_VNNI", "AVX2_VNNI_2"), "avx2_vnni"),
    "AVX512_CORE": "avx512",
    **dict.fromkeys(("AVX512_CORE_VNNI", "AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512"), "avx512_vnni"),
}


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
    levels = list(_LEVELS)
    allowed = levels[levels.index(_LIMITS.get(limit.strip().upper(), "amx")) :]
    return next((level for level in allowed if all(capable.get(name) for name in _LEVELS[level])), "other")


def detect() -> Isa:
    """The record of this process, the self-test left out."""
    onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise")
    return Isa(level_of(torch.cpu.get_capabilities(), os.environ.get(LIMIT, "")), onednn)


def processor() -> str:
    """The processor's marketing name where the system tells it, else its architecture."""
    table = Path("/proc/cpuinfo")
    lines = table.read_text(errors="replace").splitlines() if table.is_file() else []
    fields = (line.partition(":") for line in lines)
    names = (value.strip() for key, _, value in fields if key.strip() == "model name")
    return next(names, platform.processor() or platform.machine())


def machine() -> str:
    """What times depend on: processor, instructions, threads and torch."""
    return f"{processor()}, {detect().level}, {torch.get_num_threads()} threads, torch {torch.__version__}"
