"""What does less memory for states cost, on the embedded model?

python bench/state_memory.py --json docs/results/state_memory.json

Budgets: `apply(..., state_memory=)` keeps the states of some layers, the others run plain at 8 bits. Relative L2 of the
final images to full precision, DDIM. "measured" has `run=`, "smallest" has not.
16 bits: states in int16 against float32, both on integers, `--rounds` times as many images, 50 steps: the ratio of an
image's errors, geometric mean and 95 % interval.
"""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import modiff
from modiff import ModiffConfig, presets
from modiff.evaluate.metrics.paired import relative_l2
from modiff.files import check_writable, write_json
from modiff.generate.environment import environment
from modiff.generate.samplers import set_scheduler
from modiff.hosts.diffusers.load import load_pipeline
from modiff.hosts.diffusers.runs import calibration_run

SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)
Row = dict[str, Any]


def images(
    pipe: Any, draw: Callable[[int], Any], index: int, config: ModiffConfig | None, **words: Any
) -> tuple[Any, int]:
    """(N, H, W, C), and the bytes of states that they took."""
    if config is None:
        return draw(index).images, 0
    modiff.apply(pipe, config, **words)
    try:
        return draw(index).images, modiff.report(pipe).memory.states
    finally:
        modiff.remove(pipe)


def budgets(pipe: Any, run: Callable[[int], Any], name: str) -> list[Row]:
    """A row for each share of the states' bytes and each rule."""
    config, exact = presets.as_config(name), images(pipe, run, 0, None)[0]
    whole, rows = images(pipe, run, 0, config)[1], list[Row]()
    for share in tqdm(SHARES, desc=name):
        for rule, words in (("measured", {"run": lambda: run(0)}), ("smallest", {})):
            kept, size = images(pipe, run, 0, config, state_memory=max(1, int(share * whole)), **words)
            rows.append({"config": name, "share": share, "rule": rule, "mib": size / 2**20,
                         "relative_l2": relative_l2(kept, exact)})  # fmt: skip
    return rows


def int16(pipe: Any, run: Callable[[int], Any], name: str, rounds: int) -> Row:
    """Errors of single images with states in int16 over those with float32 ones."""
    config = presets.as_config(name).on_integers()
    loop = config.layer.modulation or modiff.ModulationConfig()
    small = dataclasses.replace(config.layer, modulation=dataclasses.replace(loop, state_dtype="int16"))
    logs: list[float] = []
    for index in tqdm(range(rounds), desc=f"{name}, 16 bits"):
        exact, wide, narrow = (images(pipe, run, index, c)[0]
                               for c in (None, config, dataclasses.replace(config, layer=small)))  # fmt: skip
        pairs = zip(exact, wide, narrow, strict=True)
        logs += [np.log(relative_l2(n[None], e[None]) / relative_l2(w[None], e[None])) for e, w, n in pairs]
    spread = 1.96 * np.std(logs) / len(logs) ** 0.5
    low, mean, high = (float(np.exp(np.mean(logs) + d)) for d in (-spread, 0, spread))
    return {"config": name, "images": len(logs), "error_ratio": mean, "low": low, "high": high}


def main(argv: Sequence[str] | None = None) -> None:
    """Print both tables; write them where `--json` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--steps", type=int, default=20, help="of the budgets")
    parser.add_argument("--num-images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    if options.json is not None:
        check_writable(options.json)
    pipe = set_scheduler(load_pipeline(options.model), "ddim")
    run = calibration_run(pipe, steps=options.steps, batch=options.num_images)
    rows = [row for name in ("w8a8", "w8a4") for row in budgets(pipe, run, name)]
    print("| config | bytes kept | rule | MiB | relative L2 |\n|---|--:|---|--:|--:|")
    for row in rows:
        print(f"| {row['config']} | {row['share']:.0%} | {row['rule']} | {row['mib']:.1f} | {row['relative_l2']:.4f} |")
    long = calibration_run(pipe, steps=50, batch=options.num_images)
    ratios = [int16(pipe, long, name, options.rounds) for name in ("w8a8", "w8a4", "w4a4")]
    print("\n| states in int16 | error over float32 states | interval |\n|---|--:|---|")
    for row in ratios:
        print(f"| {row['config']} | {row['error_ratio']:.2f} | {row['low']:.2f} to {row['high']:.2f} |")
    if options.json is not None:
        settings = {"steps": options.steps, "num_images": options.num_images, "rounds": options.rounds}
        write_json(options.json, {"settings": settings, "budgets": rows, "int16": ratios, "environment": environment()})


if __name__ == "__main__":
    main()
