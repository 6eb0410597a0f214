"""The process of one variant: it prepares, says so, and runs one loop each time it is told to."""

import ctypes
import gc
import os
import resource
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loop.task import CannotRun, Ready, Task, isa_of
from loop.variants import prepare
from modiff.cli.options import quiet

SEED = 0
WARM_UP_STEPS = 4
"""First step, steady state, and both kinds of step of every step cache."""


def serve(connection: Connection, task: Task) -> None:
    """Answer ("ready", facts) or ("cannot", why); then ("ran", result) to every "run", until "end"."""
    silence()
    try:
        with torch.inference_mode():
            ready = prepare(task)
            one_loop(ready, min(WARM_UP_STEPS, ready.loop.timed))
            facts = {"isa": isa_of(task), "threads": torch.get_num_threads(), "peak_mib": peak_mib()}
            facts["note"] = ready.note
            facts["device_mib"] = torch.cuda.memory_reserved() / 2**20 if task.device != "cpu" else 0.0
            connection.send(("ready", facts))
            forget_peak(task.device)
            while connection.recv() == "run":
                connection.send(("ran", result(ready, task.device)))
    except CannotRun as reason:
        connection.send(("cannot", str(reason)))
    except (EOFError, KeyboardInterrupt):
        return
    except Exception as error:  # any library's; the other variants go on
        text = str(error).strip() or repr(error)
        connection.send(("cannot", f"{type(error).__name__}: {text.splitlines()[0]}"))


def silence() -> None:
    """The table on stdout is the parent's; what libraries print goes to stderr."""
    os.dup2(2, 1)
    quiet()


def one_loop(ready: Ready, timed: int | None = None) -> tuple[Tensor, int]:
    """(images, bytes of states at the end)."""
    with ready.begin():
        images = ready.loop.run(ready.step, SEED, timed)
        return images, ready.state()


def result(ready: Ready, device: str) -> dict[str, Any]:
    """One timed loop."""
    gc.collect()
    start = time.perf_counter()
    images, state = one_loop(ready)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "steps": list(ready.loop.seconds),
        "images": images.float().numpy(),
        "state_mib": state / 2**20,
        "peak_mib": torch.cuda.max_memory_reserved() / 2**20 if device != "cpu" else peak_mib(),
    }


def forget_peak(device: str) -> None:
    """From here on the peak is that of the loops: loading and compiling need more, once. Linux and CUDA only."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if sys.platform == "linux":
        try:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        except (OSError, AttributeError):
            return  # another libc, or a closed /proc: the peak is that of the whole process then


def peak_mib() -> float:
    """The most memory this process held since `forget_peak`, libraries included."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)
