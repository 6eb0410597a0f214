"""Where a figure was measured: versions and processor, nothing that names the machine."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import TypedDict

import torch

from modiff.kernels.isa import processor


class Environment(TypedDict):
    """What a reader needs to compare figures; cores are those this process may use, gpu is None without CUDA."""

    python: str
    torch: str
    diffusers: str
    modiff: str
    cpu: str
    cores: int
    threads: int
    gpu: str | None


def environment() -> Environment:
    """Versions, processor and threads of this process."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "diffusers": _version("diffusers"),
        "modiff": _version("modiff"),
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _version(package: str) -> str:
    """The version of an installed package; modiff run from its source tree knows its own."""
    if package == "modiff":
        import modiff  # imported late: the package imports its parts

        return modiff.__version__
    return metadata.version(package)
