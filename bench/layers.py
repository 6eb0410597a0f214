"""What does a layer cost on integers: bytes moved, the roofline, the time against it, modulation over plain W8A8.

python bench/layers.py --quick
python bench/layers.py --isa vnni --json bench/results/layers.jsonl

Variants run interleaved in one process; minima and medians. Threads: OMP_NUM_THREADS=1 python bench/layers.py
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from modiff.generate.environment import environment
from modiff.kernels.encode import choose_encoder, encode_residual
from modiff.kernels.isa import LIMIT, detect
from modiff.kernels.kernel import Kernel, largest_weight_code
from modiff.kernels.problem import Problem
from modiff.model.autotune import interleaved
from roofline import Reached, Work, bytes_moved, measure_peaks, roofline_seconds

LIMITS = {"native": "", "vnni": "AVX512_CORE_VNNI", "avx512": "AVX512_CORE", "avx2_vnni": "AVX2_VNNI", "avx2": "AVX2",
          "sse41": "SSE41"}  # fmt: skip
THREE = {"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
ONE = {"kernel_size": (1, 1), "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
ALONG = {"kernel_size": (3,), "stride": (1,), "padding": (1,), "dilation": (1,)}


@dataclass(frozen=True)
class Shape:
    """A layer of a known model: its input and its problem, bits aside."""

    name: str
    size: tuple[int, ...]
    problem: Problem


SHAPES = (
    Shape("DiT-XL proj, 512 tokens", (2, 256, 1152), Problem(1152, 1152)),
    Shape("DiT-XL qkv, 512 tokens", (2, 256, 1152), Problem(1152, 3456)),
    Shape("DiT-XL fc1, 512 tokens", (2, 256, 1152), Problem(1152, 4608)),
    Shape("DiT-XL fc2, 512 tokens", (2, 256, 4608), Problem(4608, 1152)),
    Shape("DDPM conv 128, 32x32, batch 8", (8, 128, 32, 32), Problem(128, 128, **THREE)),
    Shape("DDPM conv 256, 16x16, batch 8", (8, 256, 16, 16), Problem(256, 256, **THREE)),
    Shape("DDPM conv 512 to 256, 16x16, batch 8", (8, 512, 16, 16), Problem(512, 256, **THREE)),
    Shape("SD-1.5 conv 320, 64x64, batch 2", (2, 320, 64, 64), Problem(320, 320, **THREE)),
    Shape("SD-1.5 conv 1280, 16x16, batch 2", (2, 1280, 16, 16), Problem(1280, 1280, **THREE)),
    Shape("SD-1.5 1x1 conv 640, 32x32, batch 2", (2, 640, 32, 32), Problem(640, 640, **ONE)),
    Shape("audio conv 256, 1024 samples, batch 8", (8, 256, 1024), Problem(256, 256, **ALONG)),
)
QUICK = (
    Shape("linear 192, 128 tokens", (2, 64, 192), Problem(192, 192)),
    Shape("conv 64, 16x16, batch 2", (2, 64, 16, 16), Problem(64, 64, **THREE)),
    Shape("1x1 conv 64, 16x16, batch 2", (2, 64, 16, 16), Problem(64, 64, **ONE)),
)


def variants_of(shape: Shape, bits: int) -> tuple[Kernel, dict[str, Callable[[], object]], Tensor]:
    """(kernel, the runs to time, an output)."""
    p = shape.problem
    problem = Problem(
        p.inputs, p.outputs, p.kernel_size, p.stride, p.padding, p.dilation, p.groups, bits=bits, weight_max=127
    )
    weight = torch.randint(-127, 128, problem.weight_shape).to(torch.int8)
    kernel = Kernel(problem, weight, torch.rand(p.outputs) * 1e-3)
    if largest_weight_code(weight) > problem.weight_max:
        raise SystemExit("layers: expected weight codes up to 127, got larger ones.")
    axes = len(p.kernel_size)
    x = torch.randn(shape.size)
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if axes else x
    state, bias, dense = x + 0.1 * torch.randn_like(x), torch.randn(p.outputs), torch.randn(problem.weight_shape)
    granularity, channel = ("sample", 1) if axes else ("token", -1)
    scale = torch.tensor(0.02)
    codes, *_ = encode_residual(x, None, None, bits, granularity=granularity, channel_dim=channel)
    output = kernel.new_output(codes)

    def full() -> Tensor:
        if axes == 0:
            return functional.linear(x, dense, bias)
        slide = functional.conv1d if axes == 1 else functional.conv2d
        return slide(x, dense, bias, p.stride, p.padding, p.dilation, p.groups)

    def modulated(static: Tensor | None) -> Callable[[], Tensor]:
        def run() -> Tensor:
            sent, used, _ = encode_residual(x, state, static, bits, granularity=granularity, channel_dim=channel)
            kernel.accumulate(output, sent, used)
            return output.clone()  # the model may write into what the layer returns

        return run

    def stateless(static: Tensor | None) -> Callable[[], Tensor]:
        def run() -> Tensor:
            sent, used, _ = encode_residual(x, None, static, bits, granularity=granularity, channel_dim=channel)
            return kernel.compute(sent, used, bias)

        return run

    runs: dict[str, Callable[[], object]] = {
        "float32": full,
        "plain-dynamic": stateless(None),
        "plain-static": stateless(scale),
        "modulated-dynamic": modulated(None),
        "modulated-static": modulated(scale),
        "matmul-only": lambda: kernel.accumulate(output, codes, scale),
    }
    return kernel, runs, output


def work_of(variant: str) -> Work:
    """What the roofline calls a variant."""
    names: dict[str, Work] = {"float32": "float", "matmul-only": "matmul"}
    return names.get(variant, "plain" if variant.startswith("plain") else "modulated")


def rows_of(shape: Shape, bits: int, rounds: int, reached: Reached) -> list[dict[str, object]]:
    """One row a variant."""
    kernel, runs, output = variants_of(shape, bits)
    times = interleaved(runs, rounds)
    elements = torch.Size(shape.size).numel()
    weights = torch.Size(kernel.problem.weight_shape).numel()
    operations = 2 * output.numel() * kernel.problem.summed
    rows: list[dict[str, object]] = []
    for variant, seconds in times.items():
        integer = variant != "float32" and kernel.choice.backend == "onednn"
        dynamic = variant.endswith("dynamic")
        moved = bytes_moved(work_of(variant), elements, weights, output.numel(), dynamic=dynamic)
        roofline = roofline_seconds(moved, operations, reached, integer=integer)
        against = variant.replace("modulated", "plain")
        overhead = min(seconds) / min(times[against]) - 1 if variant.startswith("modulated") else None
        rows.append(
            {
                "layer": shape.name,
                "variant": variant,
                "bits": f"W8A{bits}",
                "backend": "float32" if variant == "float32" else kernel.choice.backend,
                "reason": "" if variant == "float32" else kernel.choice.reason,
                "seconds_min": min(seconds),
                "seconds_median": statistics.median(seconds),
                "bytes": moved,
                "operations": operations,
                "roofline_seconds": roofline,
                "of_roofline": roofline / min(seconds),
                "overhead_over_plain": overhead,
            }
        )
    return rows


def commit() -> str:
    """The commit of the source tree, or "unknown"."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def show(row: dict[str, object]) -> None:
    """One line a variant."""
    over = row["overhead_over_plain"]
    print(
        f"{row['layer']!s:<38} {row['bits']!s:<5} {row['variant']!s:<18} {row['backend']!s:<12} "
        f"{float(str(row['seconds_min'])) * 1e6:>10.0f} us  median {float(str(row['seconds_median'])) * 1e6:>10.0f}  "
        f"{float(str(row['of_roofline'])):>5.0%} of roofline"
        + (f"  {float(str(over)):+.0%} over plain" if over is not None else "")
    )


def main() -> None:
    """Print a table; append JSON lines where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="three small layers, few rounds: does it run? Its times mean little"
    )
    parser.add_argument("--isa", choices=sorted(LIMITS), default="native", help="limit of oneDNN's instructions")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4], help="activation bits")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--json", type=Path, help="append one JSON line a row")
    options = parser.parse_args()
    limit = LIMITS[options.isa]
    if limit and os.environ.get(LIMIT) != limit:  # oneDNN reads it once, before anything else here runs
        command = [sys.executable, *sys.argv]
        raise SystemExit(subprocess.run(command, env={**os.environ, LIMIT: limit}, check=False).returncode)
    rounds = options.rounds or (3 if options.quick else 30)
    torch.manual_seed(0)
    reached = measure_peaks(10, 4) if options.quick else measure_peaks()
    head = {"commit": commit(), "isa": detect().level, **environment(), **reached._asdict()}
    print(f"{head['cpu']}, {head['isa']}, {head['threads']} threads; input side: {choose_encoder().reason}")
    print(", ".join(f"{name} {value:.3g}" for name, value in reached._asdict().items()))
    with torch.inference_mode():
        for shape in QUICK if options.quick else SHAPES:
            for bits in options.bits:
                for row in rows_of(shape, bits, rounds, reached):
                    show(row)
                    if options.json is not None:
                        options.json.parent.mkdir(parents=True, exist_ok=True)
                        with options.json.open("a", encoding="utf-8") as file:
                            file.write(json.dumps({**row, **head}) + "\n")


if __name__ == "__main__":
    main()
