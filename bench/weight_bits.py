"""What do 8-bit and 4-bit weights add to the error of coded activations, on the embedded model?

python bench/weight_bits.py --steps 100 --json docs/results/weight_bits.json
"""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
from tqdm import tqdm

from modiff import ModiffConfig, WeightConfig, presets
from modiff.evaluate.metrics.paired import relative_l2
from modiff.evaluate.pipelines import PipelineSource
from modiff.files import check_writable, write_json
from modiff.generate.environment import environment
from modiff.hosts.diffusers.load import load_pipeline


def with_search(config: ModiffConfig) -> ModiffConfig:
    """The same config with weight ranges of least error instead of min-max."""
    weight: WeightConfig = dataclasses.replace(config.layer.weight, search="mse")
    return dataclasses.replace(config, layer=dataclasses.replace(config.layer, weight=weight))


ROWS: dict[str, ModiffConfig] = {
    "W8A32": presets.modulated(8, None),
    "W4A32 min-max": presets.modulated(4, None),
    "W4A32 least error": with_search(presets.modulated(4, None)),
    "W32A4 tuned preset": presets.tuned(None, 4),
    "W8A4 tuned preset": presets.tuned(8, 4),
    "W4A4 tuned preset, least error": with_search(presets.tuned(4, 4)),
}


def main() -> None:
    """One row a config: relative L2 of the images to full precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--num-images", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.json is not None:
        check_writable(options.json)
    pipe = load_pipeline(options.model)
    pipe.set_progress_bar_config(disable=True)

    source = PipelineSource(pipe, seed=options.seed)

    def images(config: ModiffConfig | None) -> np.ndarray:
        with source.open(config, options.steps) as draw:
            return draw(range(options.num_images)).images

    reference = images(None)
    rows = [{"name": n, "relative_l2": relative_l2(images(c), reference)} for n, c in tqdm(ROWS.items())]
    for row in rows:
        print(f"{row['name']:<32} {row['relative_l2']:.4f}")
    if options.json is not None:
        settings = {"steps": options.steps, "num_images": options.num_images, "seed": options.seed}
        write_json(options.json, {"rows": rows, "settings": settings, "environment": dict(environment())})


if __name__ == "__main__":
    main()
