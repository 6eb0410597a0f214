"""Do integers give the images of the simulation, and what do states in 16 bits cost? On the embedded model.

python bench/integers.py --json docs/results/integers.json
python bench/integers.py --memory --json docs/results/state_memory.json

The second is about memory, DDIM. Budgets: `apply(..., state_memory=)` keeps the states of some layers, the others run
plain at 8 bits; relative L2 of the images to full precision, 20 steps; "measured" has `run=`, "smallest" has not.
States in 16 bits against float32, both on integers: the ratio of an image's errors, geometric mean and 95 % interval.
"""

import argparse
import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import modiff
from modiff import ModiffConfig, ModulationConfig, presets
from modiff.config import StateDtype
from modiff.evaluate.metrics.paired import relative_l2
from modiff.evaluate.pipelines import DrawnImages, PipelineSource
from modiff.files import check_writable, write_json
from modiff.generate.environment import environment
from modiff.generate.samplers import set_scheduler
from modiff.hosts.diffusers.load import load_pipeline
from modiff.hosts.diffusers.runs import calibration_run
from modiff.kernels.isa import detect

SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)


def with_states(config: ModiffConfig, state_dtype: StateDtype) -> ModiffConfig:
    """On integers, with both states in a dtype."""
    config = config.on_integers()
    modulation = dataclasses.replace(config.layer.modulation or ModulationConfig(), state_dtype=state_dtype)
    return dataclasses.replace(config, layer=dataclasses.replace(config.layer, modulation=modulation))


ROWS: dict[str, ModiffConfig] = {
    f"{name} {how}": make(config)
    for name, config in (("W8A8", presets.w8a8()), ("W8A4", presets.w8a4()))
    for how, make in (
        ("simulated", lambda c: c),
        ("on integers, states in float32", partial(with_states, state_dtype="float32")),
        ("on integers", ModiffConfig.on_integers),
    )
}


def measure(pipe: Any, steps: int, num_images: int, seed: int) -> list[dict[str, Any]]:
    """One row a config: distance to full precision and to the simulation, and what the states take."""

    source = PipelineSource(pipe, seed=seed)

    def run(config: ModiffConfig | None) -> DrawnImages:
        with source.open(config, steps) as draw:
            return draw(range(num_images))

    exact, rows, simulated = run(None).images, [], None
    for name, config in tqdm(ROWS.items(), unit="row"):
        sampled = run(config)
        simulated = sampled.images if name.endswith("simulated") else simulated
        rows.append(
            {
                "name": name,
                "relative_l2": relative_l2(sampled.images, exact),
                "to_simulation": relative_l2(sampled.images, simulated),
                "state_mib": sampled.state_bytes / 2**20,
            }
        )
    return rows


def images(draw: Callable[[int], Any], pipe: Any, index: int, apply: Callable[[], object] | None) -> tuple[Any, int]:
    """(N, H, W, C), and the bytes of states that they took."""
    if apply is None:
        return draw(index).images, 0
    apply()
    try:
        return draw(index).images, modiff.report(pipe).memory.states
    finally:
        modiff.remove(pipe)


def budgets(pipe: Any, name: str, num_images: int, steps: int = 20) -> list[dict[str, Any]]:
    """A row for each share of the states' bytes and each rule."""
    run = calibration_run(pipe, steps=steps, batch=num_images)
    exact = images(run, pipe, 0, None)[0]
    whole, rows = modiff.apply(pipe, name).memory.expected, list[dict[str, Any]]()  # of one image, as budgets are
    modiff.remove(pipe)
    for share in tqdm(SHARES, desc=name):
        budget = max(1, int(share * whole))
        for rule, trial in (("measured", lambda: run(0)), ("smallest", None)):
            fit = partial(modiff.apply, pipe, name, state_memory=budget, run=trial)
            kept, size = images(run, pipe, 0, fit)
            row = {"config": name, "share": share, "rule": rule, "mib": size / num_images / 2**20}
            rows.append(row | {"relative_l2": relative_l2(kept, exact)})
    return rows


def int16_ratio(pipe: Any, name: str, num_images: int, rounds: int, steps: int = 50) -> dict[str, Any]:
    """Errors of single images with states in int16 over those with float32 ones, over `rounds` batches."""
    run, logs = calibration_run(pipe, steps=steps, batch=num_images), list[float]()
    config = presets.as_config(name)
    for index in tqdm(range(rounds), desc=f"{name}, 16 bits"):
        exact, *both = (images(run, pipe, index, None if c is None else partial(modiff.apply, pipe, c))[0]
                        for c in (None, with_states(config, "float32"), config.on_integers()))  # fmt: skip
        wide, narrow = ([relative_l2(i[None], e[None]) for i, e in zip(each, exact, strict=True)] for each in both)
        logs += list(np.log(narrow) - np.log(wide))
    spread = 1.96 * np.std(logs) / len(logs) ** 0.5
    low, mean, high = (float(np.exp(np.mean(logs) + d)) for d in (-spread, 0, spread))
    return {"config": name, "images": len(logs), "error_ratio": mean, "low": low, "high": high}


def memory(pipe: Any, num_images: int, rounds: int) -> dict[str, Any]:
    """Both tables of `--memory`, printed too."""
    rows = [row for name in ("w8a8", "w8a4") for row in budgets(pipe, name, num_images)]
    for row in rows:
        print(f"{row['config']}, {row['share']:4.0%} of the bytes, {row['rule']}: {row['mib']:5.1f} MiB  "
              f"{row['relative_l2']:.4f}")  # fmt: skip
    ratios = [int16_ratio(pipe, name, num_images, rounds) for name in ("w8a8", "w8a4", "w4a4")]
    for row in ratios:
        print(f"{row['config']}: 16 bits over float32 {row['error_ratio']:.2f}, {row['low']:.2f} to {row['high']:.2f}")
    return {"budgets": rows, "int16": ratios}


def main() -> None:
    """Print the table; write it where `--json` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--num-images", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", action="store_true", help="what less memory for states costs")
    parser.add_argument("--rounds", type=int, default=4, help="batches for 16 bits, with --memory")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.json is not None:
        check_writable(options.json)
    pipe = load_pipeline(options.model)
    pipe.set_progress_bar_config(disable=True)
    if options.memory:
        results = memory(set_scheduler(pipe, "ddim"), options.num_images, options.rounds)
    else:
        results = {"rows": measure(pipe, options.steps, options.num_images, options.seed)}
        for row in results["rows"]:
            print(f"{row['name']:<36} {row['relative_l2']:.4f}  to simulation {row['to_simulation']:.4f}  "
                  f"states {row['state_mib']:.1f} MiB")  # fmt: skip
    if options.json is not None:
        settings = {"model": options.model, "steps": options.steps, "num_images": options.num_images,
                    "seed": options.seed, "isa": detect().level}  # fmt: skip
        write_json(options.json, results | {"settings": settings, "environment": dict(environment())})


if __name__ == "__main__":
    main()
