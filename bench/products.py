"""How much faster than oneDNN's float operator is the product of a modulated layer, with its epilogue, on integers?

python bench/products.py --threads 1
python bench/products.py --isa avx2 --threads 1 2 --json bench/results/products.jsonl

Codes are there already: what is timed multiplies them, scales the sums, adds them to the output state and writes the
output. All variants run interleaved in one process for each number of threads; minima, and their geometric means.
"float32" is oneDNN's operator with bias. "onednn" adds an epilogue of ours to oneDNN's int8 operator, "onednn-bare" is
that operator alone, "native" is kernels/product.py. The shapes are those of U-Nets of DDPM and SD-1.5 and of DiT-XL.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from layers import LIMITS, commit
from modiff.generate.environment import environment
from modiff.kernels.backend import Operator
from modiff.kernels.isa import LIMIT, detect
from modiff.kernels.layout import Geometry
from modiff.kernels.onednn import ONEDNN
from modiff.kernels.product import NATIVE
from modiff.model.autotune import interleaved

SHAPES = {  # of the input, with the number of outputs; four axes: a convolution of 3x3 with padding 1
    "DDPM 128, 32x32": ((4, 128, 32, 32), 128),
    "DDPM 256, 16x16": ((4, 256, 16, 16), 256),
    "DDPM 512 to 256, 16x16": ((4, 512, 16, 16), 256),
    "DDPM 256, 8x8": ((4, 256, 8, 8), 256),
    "64, 32x32": ((4, 64, 32, 32), 64),
    "SD-1.5 320, 64x64": ((2, 320, 64, 64), 320),
    "SD-1.5 640, 32x32": ((2, 640, 32, 32), 640),
    "SD-1.5 1280, 16x16": ((2, 1280, 16, 16), 1280),
    "DiT-XL proj": ((2, 256, 1152), 1152),
    "DiT-XL qkv": ((2, 256, 1152), 3456),
    "DiT-XL fc1": ((2, 256, 1152), 4608),
    "DiT-XL fc2": ((2, 256, 4608), 1152),
}
BITS = (8, 4)


def runs_of(size: tuple[int, ...], outputs: int) -> dict[str, Callable[[], Tensor]]:
    """What is timed for one shape."""
    axes = len(size) - 2 if len(size) == 4 else 0
    channels = size[1] if axes else size[-1]
    shape = (outputs, channels, *[3] * axes)

    def lay(x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last) if axes else x

    x, dense, bias = lay(torch.randn(size)), lay(torch.randn(shape)), torch.randn(outputs)
    weight = (torch.randn(shape) * 40).round().clamp(-127, 127).to(torch.int8)
    across, each = torch.rand(outputs, *[1] * axes) * 1e-3, torch.rand(size[0], *([1] * 3 if axes else [size[1], 1]))

    def full() -> Tensor:
        return functional.conv2d(x, dense, bias, padding=1) if axes else functional.linear(x, dense, bias)

    runs, geometry = {"float32": full}, Geometry((1,) * axes, (1,) * axes, (1,) * axes)
    state, output = lay(torch.zeros_like(full())), lay(torch.empty_like(full()))

    def step(backend: Any, op: Operator, codes: Tensor) -> Tensor:
        backend.step(op, state, codes, each, output)
        return output

    for bits in BITS:
        op = Operator(weight, shape, across, geometry, axes, bits, 127)
        codes = lay(torch.randint(0, 2**bits, size, dtype=torch.uint8))
        for name, backend in (("native", NATIVE), ("onednn", ONEDNN)):
            runs[f"{name} W8A{bits}"] = partial(step, backend, op, codes)
        runs[f"onednn-bare W8A{bits}"] = partial(ONEDNN.scaled, op, codes)
    return runs


def table(rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of every round, by shape and variant, in the present number of threads."""
    result: dict[str, dict[str, list[float]]] = {}
    for name, (size, outputs) in SHAPES.items():
        result[name] = times = interleaved(runs_of(size, outputs), rounds)
        fast = {variant: min(times["float32"]) / min(seconds) for variant, seconds in times.items()}
        print(f"{name:<24}" + "  ".join(f"{variant} {ratio:.2f}x" for variant, ratio in fast.items()), flush=True)
    return result


def main() -> None:
    """Print ratios to the float operator, a line a shape, and their geometric means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", choices=sorted(LIMITS), default="native", help="limit of the instructions")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="append one JSON line for each number of threads")
    options = parser.parse_args()
    limit = LIMITS[options.isa]
    if limit and os.environ.get(LIMIT) != limit:  # oneDNN reads it once, before anything else here runs
        level = {"ATEN_CPU_CAPABILITY": "avx2"} if options.isa.startswith("avx2") else {}
        command = [sys.executable, *sys.argv]
        raise SystemExit(subprocess.run(command, env={**os.environ, LIMIT: limit, **level}, check=False).returncode)
    for threads in options.threads:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        head = {"commit": commit(), "isa": detect().level, **environment()}
        print(f"{head['cpu']}, {head['isa']}, {threads} threads")
        with torch.inference_mode():
            times = table(options.rounds)
        for statistic in (min, statistics.median):
            means = {
                variant: math.prod(statistic(row["float32"]) / statistic(row[variant]) for row in times.values())
                ** (1 / len(times))
                for variant in next(iter(times.values()))
            }
            line = "  ".join(f"{variant} {ratio:.2f}x" for variant, ratio in means.items())
            print(f"geometric mean, {'minima' if statistic is min else 'medians'}: {line}", flush=True)
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            with options.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**head, "seconds": times}) + "\n")


if __name__ == "__main__":
    main()
