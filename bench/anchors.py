"""What does the weight that meets the input where the states start do to the error, on the embedded model?

python bench/anchors.py --json docs/results/anchors.json

DDIM, weights rounded to nearest, nothing calibrated: relative L2 of the final images to full precision from the same
noise. The integers are those of the paper's form in every row; only anchors differ.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import modiff
from modiff import ModiffConfig, presets
from modiff.config import PackedAnchors
from modiff.evaluate.metrics.paired import relative_l2
from modiff.files import check_writable, write_json
from modiff.generate.environment import environment
from modiff.generate.samplers import set_scheduler
from modiff.hosts.diffusers.load import load_pipeline
from modiff.hosts.diffusers.runs import noise_generators

BITS = {"W8A8": (8, 8), "W8A4": (8, 4), "W4A8": (4, 8)}
ANCHORS: dict[str, tuple[dict[str, Any], PackedAnchors | None]] = {
    "quantized (paper)": ({"anchor_weights": "quantized"}, None),
    "exact": ({}, None),
    "int8 codes": ({}, "int8"),
    "exact, every 25 steps": ({"reanchor_every": 25}, None),
    "exact, every 10 steps": ({"reanchor_every": 10}, None),
    "exact, every 5 steps": ({"reanchor_every": 5}, None),
    "exact, every 10 steps, all at once": ({"reanchor_every": 10, "stagger": False}, None),
    "int8 codes, every 10 steps": ({"reanchor_every": 10}, "int8"),
    "int8 codes, every 10 steps, all at once": ({"reanchor_every": 10, "stagger": False}, "int8"),
}
"""Settings of the loop, and what `modiff.pack` keeps; None leaves the floats."""
QUICK = ("quantized (paper)", "exact", "int8 codes")


def config_of(bits: tuple[int, int], loop: dict[str, Any]) -> ModiffConfig:
    """The modulated preset with another loop."""
    config = presets.modulated(*bits)
    modulation = dataclasses.replace(config.layer.modulation or modiff.ModulationConfig(), **loop)
    return dataclasses.replace(config, layer=dataclasses.replace(config.layer, modulation=modulation))


def main(argv: Sequence[str] | None = None) -> None:
    """A row for each way to anchor, a column for each pair of bit widths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--num-images", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="the first three rows alone")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    if options.json is not None:
        check_writable(options.json)

    def images(config: ModiffConfig | None, packing: PackedAnchors | None = None) -> np.ndarray:
        pipe: Any = set_scheduler(load_pipeline(options.model), "ddim")
        if config is not None:
            modiff.apply(pipe, config)
        if packing is not None:
            modiff.pack(pipe, anchor_weights=packing)
        noise = noise_generators(options.seed, range(options.num_images))
        arguments = {"num_inference_steps": options.steps, "generator": noise, "output_type": "np"}
        return pipe(batch_size=options.num_images, **arguments).images

    reference = images(None)
    names = QUICK if options.quick else tuple(ANCHORS)
    rows: list[dict[str, Any]] = [{"anchor": name} for name in names]
    for row, (bits, widths) in tqdm([(row, item) for row in rows for item in BITS.items()]):
        loop, packing = ANCHORS[row["anchor"]]
        row[bits] = relative_l2(images(config_of(widths, loop), packing), reference)
    print(f"| anchored with | {' | '.join(BITS)} |\n|---|{'---|' * len(BITS)}")
    for row in rows:
        print(f"| {row['anchor']} | {' | '.join(f'{row[bits]:.4f}' for bits in BITS)} |")
    if options.json is not None:
        settings = {key: getattr(options, key) for key in ("model", "steps", "num_images", "seed")}
        write_json(options.json, {"rows": rows, "settings": settings, "environment": dict(environment())})


if __name__ == "__main__":
    main()
