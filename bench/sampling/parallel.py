"""What does parallel sampling take, and how exact is modulation along its window, on the embedded model?

python bench/sampling/parallel.py --json docs/results/parallel.json

DDIM from the same noise. Relative L2 of the final images to sequential sampling in full precision; and, of modulated
rows, to parallel sampling in full precision with the same window and tolerance. Residual: the root mean square of what
a layer quantizes in the rows of a timestep, divided by that of sequential sampling at this timestep: median and 95 %
quantile over layers and timesteps of the last iteration that a row is in, and the quantile of all iterations. "states
by row" keeps states of each row from iteration to iteration instead, and moves them on with the window: what modulation
along the window is compared with.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
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
from modiff.model.observe import observe
from modiff.sampling.parallel import ParallelSampler, rows_of
from modiff.sampling.pipelines import ParallelPipeline

CONFIGS: dict[str, ModiffConfig | None] = {
    "full precision": None,
    "modulated W8A8": presets.modulated(8, 8),
    "modulated W8A4": presets.modulated(8, 4),
}
WINDOWS = ((1, 0.0), (5, 0.1), (10, 0.1), (25, 0.1), (10, 0.01))
"""Rows and tolerance; the first is sequential sampling."""
NAMES = ("parallel", "tolerance")
RESIDUALS = ("residual", "residual_95", "residual_95_all")


class Sizes:
    """The mean squares of one layer's residuals, by timestep.

    times: the timesteps of the rows in this call. parts: of a row, where an input is split into two quantizers'.
    """

    def __init__(self, times: list[float], parts: int) -> None:
        self.times, self.parts, self.seen = times, parts, 0
        self.now: dict[float, list[float]] = {}
        self.calls: dict[float, list[float]] = {}

    def observe(self, residual: Tensor) -> None:
        """Of one row of all images; where rows are in one call, the first anchors, and each reader quantizes all."""
        rows = len(self.times) - 1
        row = 1 + self.seen // self.parts % rows if rows else 0
        self.now.setdefault(self.times[row], []).append(float(residual.square().mean()))
        self.seen += 1

    def end_call(self) -> None:
        """What follows is of the next call."""
        for time, squares in self.now.items():
            self.calls.setdefault(time, []).append(statistics.mean(squares))
        self.now, self.seen = {}, 0


Squares = dict[tuple[str, float], list[float]]
"""By layer and timestep, of each call."""


def ratios(squares: Squares, before: Squares, last: bool) -> tuple[float | None, float | None]:
    """Median and 95 % quantile of the root of each over that of sequential sampling; None where there is none."""
    means = {key: calls[-1] if last else statistics.mean(calls) for key, calls in squares.items()}
    each = [(means[key] / before[key][0]) ** 0.5 for key in means.keys() & before.keys() if before[key][0]]
    return (float(np.median(each)), float(np.quantile(each, 0.95))) if each else (None, None)


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    print(
        "| | window | tolerance | iterations | evaluations | relative L2 | to parallel | residual | 95 % | 95 %, all |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for row in rows:
        shares = ["" if row[key] is None else f"{row[key]:.2f}" for key in RESIDUALS]
        errors = [f"{row[key]:.4f}" for key in ("relative_l2", "to_parallel")]
        counts = [row[key] for key in ("config", *NAMES, "iterations", "evaluations")]
        print(f"| {' | '.join(map(str, [*counts, *errors, *shares]))} |")


def sampled(
    pipe: Any, config: ModiffConfig | None, options: argparse.Namespace, settings: dict[str, Any]
) -> tuple[dict[str, Any], np.ndarray, Squares]:
    """Iterations and evaluations, images, and the squares of the residuals."""
    sizes: dict[str, Sizes] = {}
    times: list[float] = []

    def before(_: object, args: tuple[Any, ...], __: object) -> None:
        now = torch.as_tensor(args[1]).flatten().tolist()
        times[:] = now[: max(1, len(now) // options.num_images)]
        for size in sizes.values():
            size.end_call()

    if config is not None:
        modiff.apply(pipe, config)
        for name, layer in required_attachment(pipe.unet, "bench").layers.items():
            sizes[name] = Sizes(times, 1 if layer.loop.spec.split is None else 2)
            layer.quantizer.watch(lambda size=sizes[name]: size)
    noise = noise_generators(options.seed, range(options.num_images))
    with observe(pipe.unet, before_step=before):
        result = pipe(options.num_images, noise, num_inference_steps=options.steps, output_type="np", **settings)
    if config is not None:
        modiff.remove(pipe)
    squares: Squares = {}
    for name, size in sizes.items():
        size.end_call()
        squares |= {(name, time): calls for time, calls in size.calls.items()}
    counts = {name: getattr(result, name, options.steps) for name in ("iterations", "evaluations")}
    return counts, result.images, squares


def sampled_by_row(
    pipe: Any, config: ModiffConfig, options: argparse.Namespace, parallel: int, tolerance: float
) -> tuple[dict[str, Any], np.ndarray]:
    """Iterations and evaluations, and images, where each row of the window has states that move on with it."""
    denoise, size = rows_of(lambda x, t: pipe.unet(x, t).sample), pipe.unet.config.sample_size

    def evaluate(x: Tensor, t: Tensor) -> Tensor:
        rows = x.shape[1]  # the last windows are short, the batch of the states is not
        x = torch.cat([x, x[:, -1:].expand(-1, parallel - rows, *x.shape[2:])], 1)
        return denoise(x, torch.cat([t, t[-1:].expand(parallel - rows)]))[:, :rows]

    done = 0

    def move(steps: int, *_: Tensor) -> None:
        nonlocal done
        index = (torch.arange(parallel) + steps - done).clamp_max(parallel - 1)
        done = steps
        modiff.reorder(pipe.unet, (index + parallel * torch.arange(options.num_images)[:, None]).flatten())

    noise = noise_generators(options.seed, range(options.num_images))
    start = randn_tensor((options.num_images, pipe.unet.config.in_channels, size, size), generator=noise)
    sampler = ParallelSampler(pipe.scheduler, parallel, tolerance)
    modiff.apply(pipe.unet, config)
    with modiff.trajectory(pipe.unet):
        result = sampler(evaluate, start, options.steps, generator=noise, advanced=move)
    modiff.remove(pipe.unet)
    images = (result.sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    return {"iterations": result.iterations, "evaluations": result.evaluations}, images


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

    names = [name for name in CONFIGS if name != "modulated W8A8" or not options.quick]
    windows = WINDOWS[: 2 if options.quick else None]
    rows: list[dict[str, Any]] = []
    images: dict[tuple[str, int, float], np.ndarray] = {}
    sequentially: Squares = {}

    def add(name: str, window: tuple[int, float], counts: dict[str, Any], result: np.ndarray, squares: Squares) -> None:
        images[name, *window] = result
        row = {"config": name, **dict(zip(NAMES, window, strict=True)), **counts}
        row["relative_l2"] = relative_l2(result, images["full precision", *WINDOWS[0]])
        row["to_parallel"] = relative_l2(result, images["full precision", *window])
        row["residual"], row["residual_95"] = ratios(squares, sequentially, last=True)
        row["residual_95_all"] = ratios(squares, sequentially, last=False)[1]
        rows.append(row)

    for name, window in tqdm([(name, window) for name in names for window in windows]):
        config, alone = CONFIGS[name], window == WINDOWS[0]
        settings = {} if alone else dict(zip(NAMES, window, strict=True))
        counts, result, squares = sampled(sequential if alone else parallel, config, options, settings)
        sequentially = squares if alone else sequentially
        add(name, window, counts, result, squares)
        if config is not None and not alone:
            add(f"{name}, states by row", window, *sampled_by_row(sequential, config, options, *window), {})
    show(rows)
    if options.json is not None:
        origin = {key: getattr(options, key) for key in ("model", "sampler", "steps", "num_images", "seed")}
        write_json(options.json, {"rows": rows, "settings": origin, "environment": dict(environment())})


if __name__ == "__main__":
    main()
