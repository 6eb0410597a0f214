"""What do PTQD and TAC add to min-max quantization at each pair of bit widths, plain and modulated? Writes JSON rows.

python bench/sampling/corrections.py --work corrections-bench --json docs/results/corrections.json

Relative L2 of final images to full precision, DDIM with eta 0, from noise that nothing was learned from: with the plain
sampler and with each table, on one quantized network in a row. TAC is least squares. The last three columns are sizes
of the tables over the steps. Finished rows are kept: the command goes on after the last one.
"""

import argparse
import copy
import json
from pathlib import Path
from statistics import mean, median
from typing import Any

from tqdm import tqdm

from modiff import ModulationConfig
from modiff.cli.options import quiet_pipeline
from modiff.evaluate.metrics.paired import relative_l2
from modiff.files import ResumableFolder, check_writable, write_json
from modiff.generate.environment import environment
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
SHOWN = ("minmax", "ptqd", "tac", "median_k", "mean_mu", "median_K_minus_1")
MINMAX: dict[str, Any] = {"rounding": "nearest", "search": "minmax", "scales": "measured"}


def run_row(pipe: Any, comparison: Comparison, bits: tuple[int, int], mode: str, options: Any) -> dict[str, Any]:
    """Relative L2 with the plain sampler and with each table, and what was learned at each step."""

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
    tables = PtqdConfig(**shared, slope=options.slope), TacConfig(**shared, relative=0.0, ridge=0.0)
    for name, table in zip(("ptqd", "tac"), tables, strict=True):
        own = copy.copy(comparison)
        own.config = table
        correction, figures = own.learn(quantized.unet)
        quantized.scheduler = corrected(pipe.scheduler, correction)
        row[name] = relative_l2(images(quantized), exact)
        quantized.scheduler = pipe.scheduler
        row[f"{name}_steps"] = {key: [float(step[key].mean()) for step in figures] for key in figures[0]}
    k, mu, factors = row["ptqd_steps"]["k"], row["ptqd_steps"]["mu"], row["tac_steps"]["K"]
    row["median_k"], row["mean_mu"] = median(map(abs, k)), mean(map(abs, mu))
    row["median_K_minus_1"] = median(abs(factor - 1) for factor in factors)
    return row


def main() -> None:
    """Run the rows that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="or a local pipeline folder")
    for name, default in (("num-images", 8), ("pairs", 8), ("batch", 8), ("steps", 50)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--slope", choices=("any", "positive"), default="any", help="of PTQD; positive: as published")
    parser.add_argument("--work", type=Path, default=Path("corrections-bench"), help="folder of finished rows")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.json is not None:
        check_writable(options.json)
    pipe = set_scheduler(quiet_pipeline(options.model, "cpu"), "ddim")
    job = {name: value for name, value in vars(options).items() if name not in ("work", "json")}
    rows: list[dict[str, Any]] = []
    with ResumableFolder(options.work, job, record="settings.json"):
        config = PtqdConfig(
            steps=options.steps, batch=options.batch, pairs=options.pairs, samples=options.batch, groups=1
        )
        comparison = Comparison(MethodJob(pipe, config, None, None, None, False), config)
        print("| bits | mode | minmax | PTQD | TAC | median abs(k) | mean abs(mu) | median abs(K - 1) |")
        print("|---|---|--:|--:|--:|--:|--:|--:|")
        for bits, mode in tqdm([(bits, mode) for bits in BITS for mode in MODES], desc="rows"):
            path = options.work / f"w{bits[0]}a{bits[1]}-{mode.split()[0]}.json"
            if not path.exists():
                write_json(path, run_row(pipe, comparison, bits, mode, options))
            row = json.loads(path.read_text(encoding="utf-8"))
            rows.append(row)
            values = " | ".join(f"{row[name]:.4f}" for name in SHOWN)
            print(f"| W{bits[0]}A{bits[1]} | {mode} | {values} |", flush=True)
    if options.json is not None:
        write_json(options.json, {"settings": job, "rows": rows, "environment": dict(environment())})


if __name__ == "__main__":
    main()
