"""How near to the data are images by learned schedules and by decoupled diffusion, at equal evaluations?

python bench/sampling/schedules.py --reference test_images.npy --work schedules-bench --json docs/results/schedules.json

Every row has the same noise. A row is kept when it is finished: stopped at any time, the same command goes on.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from modiff.api import apply
from modiff.assets import EMBEDDED, ddm_folder, noise_level_folder
from modiff.cli.options import quiet_pipeline
from modiff.errors import ModiffError
from modiff.evaluate.features.load import DEFAULT_EXTRACTOR, load_extractor
from modiff.evaluate.metrics.frechet import Moments, frechet_interval
from modiff.evaluate.suite.images import read_reference, reference_digest
from modiff.files import ResumableFolder, check_writable, read_json, write_json
from modiff.generate.environment import environment
from modiff.generate.samplers import UnconditionalPipeline, set_scheduler
from modiff.generate.shards import to_uint8
from modiff.hosts.diffusers.runs import noise_generators
from modiff.presets import as_config
from modiff.sampling.ddm import DDMScheduler
from modiff.sampling.noise_level import LearnedSchedulePipeline, NoiseLevelEstimator

FIRST_NOISE = 1_000_000  # as bench/methods.py
SIZE = 32
CONFIGS = ("", "modulated:8:8", "modulated:8:4", "plain:8:8", "plain:8:4")


def rows(steps: Sequence[int]) -> list[dict[str, Any]]:
    """What each row is: a sampler, its evaluations, and what is quantized."""
    every = [
        {"sampler": name, "steps": count, "config": ""}
        for count in steps
        for name in (*(f"{kind}{how}" for kind in ("ddim", "ddpm") for how in ("", *LEARNED)), *DDM)
    ]
    quantized = [{"sampler": name, "steps": steps[len(steps) // 2], "config": config}
                 for name in ("trained ddm", "trained ddm eta 0", "ddim") for config in CONFIGS]  # fmt: skip
    return [*every, *(row for row in quantized if row not in every)]


DDM = ("ddm", "ddm eta 0")
LEARNED: dict[str, dict[str, Any]] = {
    ", linear betas": {"adjusted_steps": ()},
    ", linear betas, adjusted": {},
    ", fibonacci, adjusted": {"schedule": "fibonacci"},
}


def pipeline(sampler: str) -> tuple[Any, dict[str, Any]]:
    """What draws the row, and the options of its call."""
    kind, _, how = sampler.partition(",")
    if kind.startswith("trained"):
        pipe: Any = UnconditionalPipeline.from_pretrained(ddm_folder())
    else:
        pipe = set_scheduler(quiet_pipeline(EMBEDDED, "cpu"), kind.split()[0])
    if kind.endswith("eta 0"):
        pipe.scheduler = DDMScheduler.from_config(pipe.scheduler.config, eta=0.0)
    options = LEARNED.get(f",{how}", {})
    if how:
        estimator = NoiseLevelEstimator.from_pretrained(noise_level_folder())
        pipe = LearnedSchedulePipeline(pipe.unet, pipe.scheduler, estimator)
    pipe.set_progress_bar_config(disable=True)
    return pipe, options


def features(row: dict[str, Any], settings: dict[str, Any], extractor: Any) -> torch.Tensor:
    """Of the images of a row."""
    pipe, options = pipeline(row["sampler"])
    if row["config"]:
        apply(pipe, as_config(row["config"]))
    pooled: list[torch.Tensor] = []
    for first in range(0, settings["num_images"], settings["batch"]):
        indices = range(first, min(first + settings["batch"], settings["num_images"]))
        noise = noise_generators(FIRST_NOISE, indices)
        drawn = pipe(len(noise), noise, num_inference_steps=row["steps"], output_type="np", **options).images
        pooled.append(extractor(torch.from_numpy(to_uint8(drawn))).pooled)
    return torch.cat(pooled)


def moments(reference: Path, extractor: Any) -> Moments:
    """Of the features of the data, with a black border where its images are smaller."""
    gathered = Moments(extractor.dimension)
    for images in read_reference(reference):
        border = [(0, 0), *(((SIZE - side) // 2,) * 2 for side in images.shape[1:3]), (0, 0)]
        gathered.update(extractor(torch.from_numpy(np.pad(images, border))).pooled)
    return gathered


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True, help="images of the data, as `modiff evaluate` takes")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20])
    parser.add_argument("--num-images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--resamples", type=int, default=200, help="of the bootstrap interval")
    parser.add_argument("--only", default="", help="rows whose sampler begins with this")
    parser.add_argument("--work", type=Path, default=Path("schedules-bench"), help="folder of finished rows")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """One line a row: the Frechet distance to the data."""
    options = parse(arguments)
    if options.json is not None:
        check_writable(options.json)
    extractor = load_extractor(DEFAULT_EXTRACTOR)
    settings = {"num_images": options.num_images, "batch": options.batch, "extractor": extractor.name,
                "reference": reference_digest(options.reference)}  # fmt: skip
    data = None
    done: list[dict[str, Any]] = []
    with ResumableFolder(options.work, settings, record="settings.json", items="row-*"):
        for row in tqdm([row for row in rows(options.steps) if row["sampler"].startswith(options.only)]):
            path = options.work / f"row-{row['sampler']}-{row['steps']}-{row['config']}.json".replace(" ", "_")
            if not path.exists():
                data = data or moments(options.reference, extractor)
                pooled = features(row, settings, extractor)
                distance = frechet_interval(pooled, data, resamples=options.resamples)
                write_json(path, {**row, "fd_data": distance})
            done.append(read_json(path, "a row of an earlier call", "Delete it."))
    print("| sampler | evaluations | quantized | FD to data |\n|---|--:|---|--:|")
    for row in done:
        d = row["fd_data"]
        print(f"| {row['sampler']} | {row['steps']} | {row['config']} | "
              f"{d['estimate']:.3f} ({d['low']:.3f} to {d['high']:.3f}) |")  # fmt: skip
    if options.json is not None:
        write_json(options.json, {"settings": settings, "rows": done, "environment": dict(environment())})


if __name__ == "__main__":
    try:
        main()
    except (ModiffError, OSError) as mistake:
        sys.exit(f"schedules: {mistake}")
