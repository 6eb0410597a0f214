"""What does parallel sampling take, and how exact is modulation along its window, on the embedded model?

python bench/sampling/parallel.py --json docs/results/parallel.json

DDIM from the same noise. Relative L2 of the final images to sequential sampling in full precision; and, of modulated
rows, to parallel sampling in full precision with the same window and tolerance. Residual: the root mean square of what
a layer quantizes, divided by that of sequential sampling, median and largest over the layers.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

import modiff
from modiff import ModiffConfig, presets
from modiff.evaluate.metrics.paired import relative_l2
from modiff.files import check_writable, write_json
from modiff.generate.environment import environment
from modiff.generate.samplers import set_scheduler
from modiff.hosts.diffusers.load import load_pipeline
from modiff.hosts.diffusers.runs import noise_generators
from modiff.model.attach import required_attachment
from modiff.sampling.pipelines import ParallelPipeline

CONFIGS: dict[str, ModiffConfig | None] = {
    "full precision": None,
    "modulated W8A8": presets.modulated(8, 8),
    "modulated W8A4": presets.modulated(8, 4),
}
WINDOWS = ((1, 0.0), (5, 0.1), (10, 0.1), (25, 0.1), (10, 0.01))
"""Rows and tolerance; the first is sequential sampling."""


class Size:
    """The mean square of all that it observes."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def observe(self, x: Tensor) -> None:
        self.total, self.count = self.total + float(x.square().sum()), self.count + x.numel()


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    print("| | window | tolerance | iterations | evaluations | relative L2 | to parallel | residual | largest |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for row in rows:
        ratios = ["" if row[key] is None else f"{row[key]:.2f}" for key in ("residual", "largest_residual")]
        errors = [f"{row[key]:.4f}" for key in ("relative_l2", "to_parallel")]
        counts = [row[key] for key in ("config", "window", "tolerance", "iterations", "evaluations")]
        print(f"| {' | '.join(map(str, [*counts, *errors, *ratios]))} |")


def main(argv: Sequence[str] | None = None) -> None:
    """A row for each config, window and tolerance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--sampler", default="ddim", choices=("ddim", "ddpm", "dpmsolver++"))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--num-images", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="full precision and W8A4, two windows")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    if options.json is not None:
        check_writable(options.json)
    sequential = set_scheduler(load_pipeline(options.model), options.sampler)
    parallel = ParallelPipeline(unet=sequential.unet, scheduler=sequential.scheduler)
    parallel.set_progress_bar_config(disable=True)

    def sampled(config: ModiffConfig | None, rows: int, tolerance: float) -> tuple[dict[str, Any], np.ndarray]:
        pipe: Any = sequential if rows == 1 else parallel
        settings: dict[str, Any] = {"num_inference_steps": options.steps, "output_type": "np"}
        settings |= {} if rows == 1 else {"parallel": rows, "tolerance": tolerance}
        layers, sizes = {}, {}
        if config is not None:
            modiff.apply(pipe, config)
            layers = required_attachment(pipe.unet, "bench").layers
        for name, layer in layers.items():
            sizes[name] = Size()
            layer.quantizer.watch(lambda size=sizes[name]: size)
        noise = noise_generators(options.seed, range(options.num_images))
        result = pipe(batch_size=options.num_images, generator=noise, **settings)
        if config is not None:
            modiff.remove(pipe)
        counts = {name: getattr(result, name, options.steps) for name in ("iterations", "evaluations")}
        means = {name: size.total / size.count for name, size in sizes.items() if size.count}  # layers share quantizers
        return counts | {"sizes": means}, result.images

    names = [name for name in CONFIGS if name != "modulated W8A8" or not options.quick]
    windows = WINDOWS[: 2 if options.quick else None]
    rows: list[dict[str, Any]] = []
    images: dict[tuple[str, int, float], np.ndarray] = {}
    for name, window in tqdm([(name, window) for name in names for window in windows]):
        row, images[name, *window] = sampled(CONFIGS[name], *window)
        sizes = row.pop("sizes")
        if window == WINDOWS[0]:
            before = sizes
        ratios = [(sizes[layer] / before[layer]) ** 0.5 for layer in sizes]
        row |= {"config": name, "window": window[0], "tolerance": window[1]}
        row["relative_l2"] = relative_l2(images[name, *window], images["full precision", *WINDOWS[0]])
        row["to_parallel"] = relative_l2(images[name, *window], images["full precision", *window])
        row["residual"], row["largest_residual"] = (statistics.median(ratios), max(ratios)) if ratios else (None, None)
        rows.append(row)
    show(rows)
    if options.json is not None:
        settings = {key: getattr(options, key) for key in ("model", "sampler", "steps", "num_images", "seed")}
        write_json(options.json, {"rows": rows, "settings": settings, "environment": dict(environment())})


if __name__ == "__main__":
    main()
