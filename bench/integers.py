"""Do integers give the images of the simulation, and what do states in 16 bits cost? On the embedded model.

python bench/integers.py --json docs/results/integers.json
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from tqdm import tqdm

from modiff import ModiffConfig, presets
from modiff.evaluate.metrics.paired import relative_l2
from modiff.evaluate.pipelines import DrawnImages, PipelineSource
from modiff.files import check_writable, write_json
from modiff.generate.environment import environment
from modiff.hosts.diffusers.load import load_pipeline
from modiff.kernels.isa import detect


def with_fixed_states(config: ModiffConfig) -> ModiffConfig:
    """On integers, with both states in 16 bits."""
    config = config.on_integers()
    modulation = dataclasses.replace(config.layer.modulation or presets.w8a8().layer.modulation, state_dtype="int16")
    return dataclasses.replace(config, layer=dataclasses.replace(config.layer, modulation=modulation))


ROWS: dict[str, ModiffConfig] = {
    f"{name} {how}": make(config)
    for name, config in (("W8A8", presets.w8a8()), ("W8A4", presets.w8a4()))
    for how, make in (
        ("simulated", lambda c: c),
        ("on integers", ModiffConfig.on_integers),
        ("on integers, states in 16 bits", with_fixed_states),
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


def main() -> None:
    """Print the table; write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--num-images", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.json is not None:
        check_writable(options.json)
    pipe = load_pipeline(options.model)
    pipe.set_progress_bar_config(disable=True)
    rows = measure(pipe, options.steps, options.num_images, options.seed)
    for row in rows:
        print(f"{row['name']:<36} {row['relative_l2']:.4f}  to simulation {row['to_simulation']:.4f}  "
              f"states {row['state_mib']:.1f} MiB")  # fmt: skip
    if options.json is not None:
        settings = {"model": options.model, "steps": options.steps, "num_images": options.num_images,
                    "seed": options.seed, "isa": detect().level}  # fmt: skip
        write_json(options.json, {"rows": rows, "settings": settings, "environment": dict(environment())})


if __name__ == "__main__":
    main()
