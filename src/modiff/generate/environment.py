"""Where a figure was measured: versions and processor, nothing that names the machine."""

import os
import platform
from importlib import metadata
from typing import Any

import torch

from modiff.config import VERSION
from modiff.kernels.isa import processor

Environment = dict[str, Any]


def environment() -> Environment:
    """Versions, processor and threads of this process."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "diffusers": metadata.version("diffusers"),
        "modiff": VERSION,
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
