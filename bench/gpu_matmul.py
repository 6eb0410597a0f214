"""What does a GPU give for integers? int8 and fp8 against bf16 at the shapes of real denoisers, and percent of peak.

python bench/gpu_matmul.py --json bench/results/gpu_matmul.json
python bench/gpu_matmul.py --dry-run            # tiny shapes on the CPU, in Triton's interpreter: does it run?

Linear: DiT-XL/2, 32 images of 256 tokens. Convolutions: the U-Net of SDXL, 4 latents of 128x128. Variants: torch's bf16
matmul and convolution, torch._int_mm, our Triton kernels on uint8 codes (the sums alone, and added to an fp16 output
state that is the layer's output), torch._scaled_mm in fp8 e4m3. Interleaved rounds; caches are flushed before each run.
"""

import argparse
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from modiff.files import check_writable, write_json
from modiff.generate.environment import environment
from modiff.kernels.layout import Geometry

PEAKS = {"bf16": 989e12, "int8": 1979e12, "fp8": 1979e12}
"""Dense operations a second of an H100 or H200 SXM, from the data sheet."""
FLUSH = 256 * 2**20
"""Bytes written before each run: more than any cache holds."""


@dataclass(frozen=True)
class Shape:
    """A matmul (rows, depth, columns), or a 3x3 convolution of (images, channels, side) to as many columns."""

    name: str
    rows: int
    depth: int
    columns: int
    side: int = 0

    @property
    def operations(self) -> int:
        """2 for each product."""
        if self.side:
            return 2 * self.rows * self.side**2 * 9 * self.depth * self.columns
        return 2 * self.rows * self.depth * self.columns


SHAPES = (
    Shape("DiT-XL proj", 8192, 1152, 1152),
    Shape("DiT-XL qkv", 8192, 1152, 3456),
    Shape("DiT-XL fc1", 8192, 1152, 4608),
    Shape("DiT-XL fc2", 8192, 4608, 1152),
    Shape("SDXL attention 640, 64x64", 16384, 640, 640),
    Shape("SDXL GEGLU 1280, 32x32", 4096, 1280, 10240),
    Shape("SDXL conv 320, 128x128", 4, 320, 320, 128),
    Shape("SDXL conv 640, 64x64", 4, 640, 640, 64),
    Shape("SDXL conv 1280, 32x32", 4, 1280, 1280, 32),
    Shape("SDXL conv 1920 to 640, 64x64", 4, 1920, 640, 64),
)
TINY = (Shape("tiny matmul", 20, 40, 24), Shape("tiny conv", 1, 16, 16, 5))


def variants_of(shape: Shape, device: torch.device) -> dict[str, Callable[[], object]]:
    """What is timed for a shape; those that this device or torch lacks raise when they are called."""
    return _convolutions(shape, device) if shape.side else _matmuls(shape, device)


def _matmuls(shape: Shape, device: torch.device) -> dict[str, Callable[[], object]]:
    from modiff.kernels.triton.loops import run_linear

    x = torch.randn(shape.rows, shape.depth, device=device, dtype=torch.bfloat16)
    w = torch.randn(shape.columns, shape.depth, device=device, dtype=torch.bfloat16)
    codes, weight, across, one = _integers((shape.rows, shape.depth), (shape.columns, shape.depth), device)
    signed = (codes.to(torch.int16) - 128).to(torch.int8)
    state = torch.zeros(shape.rows, shape.columns, device=device, dtype=torch.float16)
    sums = torch.empty(shape.rows, shape.columns, device=device, dtype=torch.int32)

    def fp8() -> object:
        scale = torch.ones((), device=device)
        a, b = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
        return lambda: torch._scaled_mm(a, b.t(), scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16)

    return {
        "bf16": lambda: functional.linear(x, w),
        "int8 torch": lambda: torch._int_mm(signed, weight.t()),
        "int8 ours, sums": lambda: run_linear(codes, weight, across, one, 128, output=sums),
        "int8 ours, into the state": lambda: run_linear(codes, weight, across, one, 128, state=state),
        "fp8": _prepared(fp8),
    }


def _convolutions(shape: Shape, device: torch.device) -> dict[str, Callable[[], object]]:
    from modiff.kernels.triton.loops import run_conv

    size = (shape.rows, shape.depth, shape.side, shape.side)
    layout = torch.channels_last
    x = torch.randn(size, device=device, dtype=torch.bfloat16).contiguous(memory_format=layout)
    w = torch.randn(shape.columns, shape.depth, 3, 3, device=device, dtype=torch.bfloat16)
    w = w.contiguous(memory_format=layout)
    codes, weight, across, one = _integers(size, (shape.columns, shape.depth, 3, 3), device)
    codes, packed = codes.contiguous(memory_format=layout), weight.permute(0, 2, 3, 1).contiguous()
    geometry, out = Geometry((1, 1), (1, 1), (1, 1)), (shape.rows, shape.columns, shape.side, shape.side)
    state = torch.zeros(out, device=device, dtype=torch.float16).contiguous(memory_format=layout)
    sums = torch.empty(out, device=device, dtype=torch.int32).contiguous(memory_format=layout)
    return {
        "bf16": lambda: functional.conv2d(x, w, padding=1),
        "int8 ours, sums": lambda: run_conv(codes, packed, across, one, 128, geometry, output=sums),
        "int8 ours, into the state": lambda: run_conv(codes, packed, across, one, 128, geometry, state=state),
    }


def _integers(x: tuple[int, ...], w: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    codes = torch.randint(0, 256, x, device=device, dtype=torch.uint8)
    weight = torch.randint(-127, 128, w, device=device, dtype=torch.int8)
    return codes, weight, torch.rand(w[0], device=device), torch.ones(1, device=device)


def _prepared(make: Callable[[], Any]) -> Callable[[], object]:
    """Made at the first call, so that what a device lacks is one row's failure."""
    made: list[Any] = []

    def run() -> object:
        if not made:
            made.append(make())
        return made[0]()

    return run


def timed(runs: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float] | str]:
    """Seconds of each run in each round, or why it cannot run."""
    measured: dict[str, list[float] | str] = {}
    for name, run in runs.items():
        try:
            run()
            measured[name] = []
        except (RuntimeError, NotImplementedError, AttributeError, ValueError) as error:
            measured[name] = str(error).splitlines()[0][:120]
    flush = torch.empty(FLUSH if device.type == "cuda" else 1, dtype=torch.uint8, device=device)
    for _ in range(rounds):
        for name, times in measured.items():
            if isinstance(times, list):
                flush.zero_()
                times.append(_seconds(runs[name], device))
    return measured


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        run()
        return float("nan")  # an interpreter's time says nothing
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    run()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after) / 1e3


def rows_of(shape: Shape, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """One row a variant."""
    rows = []
    for name, times in timed(variants_of(shape, device), rounds, device).items():
        row: dict[str, Any] = {"shape": shape.name, "variant": name, "operations": shape.operations}
        if isinstance(times, str):
            rows.append(row | {"cannot": times})
            continue
        rate = shape.operations / min(times)
        peak = PEAKS["fp8" if name == "fp8" else "int8" if name.startswith("int8") else "bf16"]
        rows.append(row | {"seconds_min": min(times), "seconds_median": statistics.median(times),
                           "operations_per_second": rate, "of_peak": rate / peak})  # fmt: skip
    return rows


def show(row: dict[str, Any]) -> str:
    """One line a variant."""
    head = f"{row['shape']:<30} {row['variant']:<26}"
    if "cannot" in row:
        return f"{head} cannot run: {row['cannot']}"
    rate = row["operations_per_second"] / 1e12
    return f"{head} {1e6 * row['seconds_min']:9.1f} us  median {1e6 * row['seconds_median']:9.1f}  " \
           f"{rate:7.0f} TOP/s  {row['of_peak']:5.0%} of peak"  # fmt: skip


def main() -> None:
    """Print the table; write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, no times")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.json is not None and options.dry_run:
        parser.error(
            "--json: expected a run on a GPU, got --dry-run. An interpreter's times say nothing. Leave one out."
        )
    if options.json is not None:
        check_writable(options.json)
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        raise SystemExit("gpu_matmul: expected a CUDA device, got none. Use --dry-run to see that it runs.")
    device = torch.device("cpu" if options.dry_run else "cuda")
    rows: list[dict[str, Any]] = []
    for shape in TINY if options.dry_run else SHAPES:
        for row in rows_of(shape, 1 if options.dry_run else options.rounds, device):
            rows.append(row)
            print(show(row), flush=True)
    if options.json is not None:
        write_json(options.json, {"rows": rows, "rounds": options.rounds, "environment": dict(environment())})


if __name__ == "__main__":
    main()
