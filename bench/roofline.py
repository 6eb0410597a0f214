"""The least time that a layer can take: what must move through memory, what must be computed, what the machine does.

seconds = max(bytes / (bytes a second), operations / (operations a second))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch.nn import functional

from modiff.kernels.kernel import Kernel
from modiff.kernels.problem import Problem
from modiff.model.autotune import interleaved

Work = Literal["float", "plain", "modulated", "matmul"]
"""A layer in floats, on integers without memory, modulated on integers; or the integer matmul alone."""


class Reached(NamedTuple):
    """What a machine reaches: bytes a second of a copy; operations a second of float32 and of integer matmuls."""

    bytes_per_second: float
    float_operations: float
    integer_operations: float


def measure_peaks(rounds: int = 50, mebibytes: int = 64) -> Reached:
    """What this machine reaches with the present number of threads. Cost: about half a second."""
    rows, inner, columns = 256, 1024, 512
    source = torch.zeros(mebibytes * 2**20 // 4)
    target = torch.empty_like(source)
    a, w = torch.randn(rows, inner), torch.randn(columns, inner)
    codes = torch.randint(0, 16, (rows, inner)).to(torch.uint8)
    weight = torch.randint(-127, 128, (columns, inner)).to(torch.int8)
    kernel = Kernel(Problem(inner, columns, bits=4), weight, torch.ones(columns))
    output, one = kernel.new_output(codes), torch.ones(())
    runs: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(source),
        "float": lambda: functional.linear(a, w),
        "integer": lambda: kernel.accumulate(output, codes, one),
    }
    best = {name: min(seconds) for name, seconds in interleaved(runs, rounds).items()}
    operations = 2 * rows * inner * columns
    return Reached(2 * source.nbytes / best["copy"], operations / best["float"], operations / best["integer"])


def bytes_moved(
    work: Work, elements: int, weights: int, outputs: int, *, dynamic: bool = True, itemsize: int = 4
) -> int:
    """Bytes between memory and the core, if every stage reads and writes once; states are float32.

    Args:
        elements, weights, outputs: of the input, the weight and the output. itemsize: of the model's floats.
        dynamic: scales are measured, in a pass of their own.

    >>> bytes_moved("float", 100, 10, 100), bytes_moved("plain", 100, 10, 100), bytes_moved("modulated", 100, 10, 100)
    (840, 1410, 3810)
    """
    if work == "float":
        return itemsize * (elements + weights + outputs)
    passes, matmul = 2 if dynamic else 1, elements + weights
    if work == "matmul":
        return matmul + 8 * outputs
    if work == "plain":
        return (itemsize * passes + 1) * elements + matmul + itemsize * outputs
    state = (itemsize + 4) * passes + 4 + 1  # input and state read, state and codes written
    return state * elements + matmul + (8 + 4 + itemsize) * outputs  # output state read and written, then copied


def roofline_seconds(moved: int, operations: int, reached: Reached, *, integer: bool) -> float:
    """The least time for these bytes and operations (2 for each product that is summed)."""
    rate = reached.integer_operations if integer else reached.float_operations
    return max(moved / reached.bytes_per_second, operations / rate)
