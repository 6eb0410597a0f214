"""Turn finished runs of train_ddm.py and train_noise_level.py into assets of the package: sample, measure, write cards.

    python training/sampling_assets.py --ddm runs/ddm --noise-level runs/noise_level --test-images test_images.npy

Writes `OUT/fashion_mnist_ddm` and `OUT/fashion_mnist_noise_level`, each put in place when it is complete; either run
may be left out.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import torch
from make_assets import distance, draw_grid, install, read_record
from torch import Tensor
from train_reference import load_images

from modiff.assets import classifier_folder
from modiff.evaluate.features.classifier import load_classifier
from modiff.generate.samplers import UnconditionalPipeline
from modiff.sampling.noise_level import NoiseLevelEstimator

RECORD = ("images", "minutes", "size", "batch", "learning_rate", "ema", "seed", "device", "step", "images_seen",
          "training_seconds", "parameters", "calls", "schedule")  # fmt: skip
BEGUN = "the weights of a model that predicts noise, named below; its last layer was repeated for each output"
COUNTS = ("images_seen", "step", "parameters", "training_seconds")
LEVELS = (0.01, 0.1, 0.5, 0.9, 0.99)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    package = Path(__file__).resolve().parents[1] / "src" / "modiff" / "assets"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ddm", type=Path, help="output folder of train_ddm.py")
    parser.add_argument("--noise-level", type=Path, help="output folder of train_noise_level.py")
    parser.add_argument("--test-images", type=Path, required=True, help="uint8 .npy file; the yardstick")
    parser.add_argument("-o", "--output", type=Path, default=package, help="folder of the assets; default: the package")
    parser.add_argument("--samples", type=int, default=500, help="of the DDM, compared with as many test images")
    parser.add_argument("--steps", type=int, default=10, help="evaluations of the DDM")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def level_errors(estimator: NoiseLevelEstimator, images: Tensor, seed: int) -> list[dict[str, float]]:
    """Mean and root mean square error of the estimated ab of test images at some levels."""
    clean, noise = images.float() / 127.5 - 1, torch.Generator().manual_seed(seed)
    rows = []
    for level in LEVELS:
        noisy = level**0.5 * clean + (1 - level) ** 0.5 * torch.randn(clean.shape, generator=noise)
        seen = torch.cat([estimator.levels(part) for part in noisy.split(500)]).double()
        rows.append({"level": level, "mean": float(seen.mean()), "error": float((seen - level).square().mean().sqrt())})
    return rows


def noise_level(options: argparse.Namespace, run: Path, target: Path) -> dict[str, Any]:
    """The files of the estimator, and what its card says."""
    record = read_record(run / "training.json", (*RECORD, "channels"))
    shutil.copytree(run / "pipeline" / "estimator", target)
    rows = level_errors(
        NoiseLevelEstimator.from_pretrained(target), load_images(options.test_images, record["size"]), 0
    )
    table = "\n".join(f"| {row['level']} | {row['mean']:.4f} | {row['error']:.4f} |" for row in rows)
    return {**record, "levels": rows, "table": table}


def ddm(options: argparse.Namespace, run: Path, target: Path) -> dict[str, Any]:
    """The files of the pipeline, its samples, and what its card says."""
    record = read_record(run / "training.json", (*RECORD, "attenuation", "begin_with"))
    shutil.copytree(run / "pipeline", target)
    pipe = UnconditionalPipeline.from_pretrained(target)
    pipe.set_progress_bar_config(disable=True)
    drawn, batch = [], 50
    for first in range(0, options.samples, batch):
        noise = torch.Generator().manual_seed(options.seed + first)
        count = min(batch, options.samples - first)
        images = pipe(count, noise, num_inference_steps=options.steps, output_type="np").images
        drawn.append(torch.from_numpy((images * 255).round()).byte().permute(0, 3, 1, 2))
    samples, real = torch.cat(drawn), load_images(options.test_images, record["size"])[: options.samples]
    draw_grid(samples, target / "samples.png")
    judged = distance(load_classifier(classifier_folder()), samples, real, "cpu")
    return {**record, "steps": options.steps, "samples": options.samples, "frechet_distance": f"{judged['value']:.3f}",
            "megabytes": f"{(target / 'unet' / 'diffusion_pytorch_model.safetensors').stat().st_size / 1e6:.1f}",
            "begun": BEGUN if record["begin_with"] else "random weights",
            "begin_option": f"--begin-with {record['begin_with']} " if record["begin_with"] else ""}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the assets of the runs that are there."""
    options = parse_arguments(arguments)
    for name, run, make in (
        ("fashion_mnist_noise_level", options.noise_level, noise_level),
        ("fashion_mnist_ddm", options.ddm, ddm),
    ):
        if run is None:
            continue
        target = options.output / f"{name}.making"
        shutil.rmtree(target, ignore_errors=True)
        facts = make(options, run, target)
        card = Template(Path(__file__).with_name(f"model_card_{name.removeprefix('fashion_mnist_')}.md").read_text())
        calls = [f"--minutes {call['minutes']} from image {call['from_image']:,}" for call in facts["calls"]]
        shown = {
            k: f"{v:,}" if k in ("images_seen", "step", "parameters", "training_seconds") else v
            for k, v in facts.items()
        }
        (target / "README.md").write_text(card.substitute(shown, stages=", then ".join(calls)))
        record = (run / "training.json").read_text()
        (target / "training.json").write_text(json.dumps(json.loads(record), indent=1) + "\n")
        install(target, options.output / name)
        print(f"saved {options.output / name}")


if __name__ == "__main__":
    main()
