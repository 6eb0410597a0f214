"""How much noise does quantization inject, by the estimate of a network that sees the samples alone?

python bench/sampling/injected_noise.py --num-images 64 --json docs/results/injected_noise.json

The estimated 1 - ab of the samples at steps of DDIM trajectories from the same noise, as a multiple of what the
schedule says; and, to compare, what only a reference shows: relative L2 of the samples to those of full precision.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from modiff.api import apply, remove
from modiff.assets import noise_level_folder
from modiff.cli.options import quiet_pipeline
from modiff.errors import ModiffError
from modiff.files import check_writable, write_json
from modiff.generate.environment import environment
from modiff.hosts.diffusers.runs import noise_generators
from modiff.presets import as_config
from modiff.sampling.noise_level import NoiseLevelEstimator

CONFIGS = ("", "modulated:8:8", "plain:8:8", "modulated:8:4", "plain:8:6", "plain:8:4", "modulated:4:8", "plain:4:8")
SHARES = (0.5, 0.7, 0.9)


def states(pipe: Any, settings: dict[str, Any]) -> Tensor:
    """The sample before each step and after the last, (steps + 1, N, C, H, W)."""
    seen: list[Tensor] = []
    handle = pipe.unet.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    try:
        noise = noise_generators(settings["seed"], range(settings["num_images"]))
        drawn = pipe(len(noise), noise, num_inference_steps=settings["steps"], output_type="np").images
    finally:
        handle.remove()
    return torch.stack([*seen, torch.from_numpy(drawn).permute(0, 3, 1, 2) * 2 - 1])


def measure(
    config: str, pipe: Any, estimator: NoiseLevelEstimator, exact: Tensor | None, settings: dict[str, Any]
) -> Any:
    """A row, and the samples. injected: the mean over steps of |log((1 - a) / (1 - ab))|, in units of one nat."""
    if config:
        apply(pipe, as_config(config))
    samples = states(pipe, settings)
    if config:
        remove(pipe)
    pipe.scheduler.set_timesteps(settings["steps"])
    ab = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps].double()
    logs = torch.stack([estimator(x).detach().double().mean() for x in samples])
    excess = logs[:-1] - (1 - ab).log()
    exact = samples if exact is None else exact
    error = (samples - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    at = [round(share * (settings["steps"] - 1)) for share in SHARES]
    row = {
        "config": config or "full precision",
        "noise": [math.exp(value) for value in logs.tolist()],
        "schedule": (1 - ab).tolist(),
        "relative_l2": error.tolist(),
        "shown": [float(excess[i].exp()) for i in at],
        "last": math.exp(float(logs[-1])),
    }
    return row, samples


def main(arguments: Sequence[str] | None = None) -> None:
    """One line a config."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--num-images", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.json is not None:
        check_writable(options.json)
    settings = {name: getattr(options, name) for name in ("steps", "num_images", "seed")}
    pipe = quiet_pipeline("embedded", "cpu")
    estimator, exact, rows = NoiseLevelEstimator.from_pretrained(noise_level_folder()), None, []
    for config in tqdm(CONFIGS):
        row, samples = measure(config, pipe, estimator, exact, settings)
        exact = samples if exact is None else exact
        rows.append(row)
    heads = [f"{share:.0%} of the way" for share in SHARES]
    print(f"| config | {' | '.join(heads)} | final images | relative L2 |\n|---|{'--:|' * (len(SHARES) + 2)}")
    for row in rows:
        print(f"| {row['config']} | {' | '.join(f'{value:.3f}' for value in row['shown'])} | {row['last']:.2e} | "
              f"{row['relative_l2'][-1]:.4f} |")  # fmt: skip
    if options.json is not None:
        write_json(options.json, {"settings": settings, "rows": rows, "environment": dict(environment())})


if __name__ == "__main__":
    try:
        main()
    except (ModiffError, OSError) as mistake:
        sys.exit(f"injected_noise: {mistake}")
