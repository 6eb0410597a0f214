"""What do PTQD and TAC add to min-max quantization at each pair of bit widths, plain and modulated? Writes JSON rows.

python bench/sampling/corrections.py --work corrections-bench

Relative L2 of final images to full precision, DDIM, from noise that nothing was learned from: with the plain sampler
and with each table, on one quantized network in a row. Finished rows are kept: the command goes on after the last one.
"""

import argparse
import copy
import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from modiff import ModulationConfig
from modiff.cli.options import quiet_pipeline
from modiff.evaluate.metrics.paired import relative_l2
from modiff.files import ResumableFolder, write_json
from modiff.generate.samplers import set_scheduler
from modiff.hosts.diffusers.runs import noise_generators
from modiff.methods import MethodJob, PtqdConfig, QDiffusionConfig, TacConfig
from modiff.methods.correction import Comparison
from modiff.methods.q_diffusion import q_diffusion
from modiff.model.trajectory import clone
from modiff.sampling.corrected import corrected

FIRST_NOISE = 1_000_000
MODES = {
    "plain": None,
    "exact anchors": ModulationConfig(),
    "quantized anchors": ModulationConfig(anchor_weights="quantized"),
}
BITS = ((4, 8), (8, 8), (8, 4), (4, 4))
MINMAX: dict[str, Any] = {"rounding": "nearest", "search": "minmax", "scales": "measured"}


def run_row(pipe: Any, comparison: Comparison, bits: tuple[int, int], mode: str, options: Any) -> dict[str, Any]:
    """Relative L2 with the plain sampler and with each table, and the mean size of the table's entries."""

    def images(source: Any) -> Any:
        noise = noise_generators(FIRST_NOISE, range(options.num_images))
        return source(batch_size=options.num_images, num_inference_steps=options.steps, generator=noise,
                      output_type="np").images  # fmt: skip

    shared: dict[str, Any] = {"steps": options.steps, "batch": options.batch}
    config = QDiffusionConfig(weight_bits=bits[0], activation_bits=bits[1], samples=2 * options.batch, **shared,
                              groups=min(10, options.steps), modulation=MODES[mode], **MINMAX)  # fmt: skip
    quantized, exact = clone(pipe), images(pipe)
    q_diffusion(MethodJob(quantized, config, None, None, None, False), config)
    row: dict[str, Any] = {"bits": bits, "mode": mode, "minmax": relative_l2(images(quantized), exact)}
    shared |= {"groups": 1, "pairs": options.pairs, "samples": options.batch}
    tables = PtqdConfig(**shared, slope="any"), TacConfig(**shared, relative=0.0, ridge=0.0)
    for name, table in zip(("ptqd", "tac"), tables, strict=True):
        own = copy.copy(comparison)
        own.config = table
        correction, figures = own.learn(quantized.unet)
        quantized.scheduler = corrected(pipe.scheduler, correction)
        row[name] = relative_l2(images(quantized), exact)
        quantized.scheduler = pipe.scheduler
        row[f"{name}_steps"] = {key: [float(step[key].mean()) for step in figures] for key in figures[0]}
    return row


def main() -> None:
    """Run the rows that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="or a local pipeline folder")
    for name, default in (("num-images", 8), ("pairs", 8), ("batch", 8), ("steps", 50)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--work", type=Path, default=Path("corrections-bench"), help="folder of finished rows")
    options = parser.parse_args()
    pipe = set_scheduler(quiet_pipeline(options.model, "cpu"), "ddim")
    job = {name: value for name, value in vars(options).items() if name != "work"}
    with ResumableFolder(options.work, job, record="settings.json"):
        config = PtqdConfig(
            steps=options.steps, batch=options.batch, pairs=options.pairs, samples=options.batch, groups=1
        )
        comparison = Comparison(MethodJob(pipe, config, None, None, None, False), config)
        print("| bits | mode | minmax | PTQD | TAC |\n|---|---|--:|--:|--:|")
        for bits, mode in tqdm([(bits, mode) for bits in BITS for mode in MODES], desc="rows"):
            path = options.work / f"w{bits[0]}a{bits[1]}-{mode.split()[0]}.json"
            if not path.exists():
                write_json(path, run_row(pipe, comparison, bits, mode, options))
            row = json.loads(path.read_text(encoding="utf-8"))
            values = " | ".join(f"{row[name]:.4f}" for name in ("minmax", "ptqd", "tac"))
            print(f"| W{bits[0]}A{bits[1]} | {mode} | {values} |", flush=True)


if __name__ == "__main__":
    main()
