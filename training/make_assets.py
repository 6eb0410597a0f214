"""Turn a finished training run and a classifier into the assets of the package: check, sample, measure, write the card.

    python training/make_assets.py --run runs/fashion --classifier runs/classifier --test-images test_images.npy
    python training/make_assets.py --data cifar10 --run runs/cifar10 --classifier runs/judge \\
        --test-images test_images.npy --samples 10000 --steps 100 --batch 500

Writes `OUT/NAME` (diffusers folder, model card, sample grid, metrics.json, training.json) and `OUT/NAME_classifier`,
where NAME is that of --data. Both are put in place at the end only. An interrupted run keeps its samples in
`OUT/NAME.making` and goes on from there when it is started again with the same model and options.
"""

import argparse
import hashlib
import json
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch
from diffusers import DDIMPipeline
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from train_classifier import CONFIDENT, probabilities
from train_reference import load_images

from modiff.errors import FormatError
from modiff.evaluate.features.classifier import Classifier, ClassifierFeatures, load_classifier
from modiff.evaluate.metrics.frechet import Moments, frechet_distance


class Data(NamedTuple):
    """What a model of one data set may weigh, and its card."""

    most_parameters: int
    most_bytes: int
    card: Path


DATA = {
    "fashion_mnist": Data(6_000_000, 12_000_000, Path(__file__).with_name("model_card.md")),
    "cifar10": Data(10_000_000, 20_000_000, Path(__file__).with_name("model_card_cifar10.md")),
}
WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"
LEAST_CONFIDENT, LEAST_ENTROPY = 0.75, 2.0
# The options that shape a model; those left out concern the machine and the rhythm of saving.
UNET_ARGUMENTS = ("images", "minutes", "size", "channels", "layers", "attention", "schedule", "batch", "learning_rate",
                  "weighting", "warmup", "anneal", "ema", "seed")  # fmt: skip
CLASSIFIER_ARGUMENTS = ("images", "labels", "test_images", "test_labels", "epochs", "size", "channels", "batch",
                        "learning_rate", "weight_decay", "shift", "seed")  # fmt: skip
UNET_RECORD = (*UNET_ARGUMENTS, "output", "device", "step", "images_seen", "training_seconds", "calls")
CLASSIFIER_RECORD = (*CLASSIFIER_ARGUMENTS, "output", "test_accuracy")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with the values that made the embedded assets as defaults."""
    package = Path(__file__).resolve().parents[1] / "src" / "modiff" / "assets"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=DATA, default="fashion_mnist", help="what the model draws")
    parser.add_argument("--run", type=Path, required=True, help="output folder of train_reference.py")
    parser.add_argument("--classifier", type=Path, required=True, help="output folder of train_classifier.py")
    parser.add_argument("--test-images", type=Path, required=True, help="uint8 .npy file; the yardstick of the check")
    parser.add_argument("-o", "--output", type=Path, default=package, help="folder of the assets; default: the package")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def read_record(path: Path, fields: Sequence[str]) -> dict[str, Any]:
    """The training.json of a training script, with at least these fields."""
    try:
        record = json.loads(path.read_text())
        missing = [name for name in fields if name not in record]
    except (OSError, ValueError, TypeError) as error:
        raise SystemExit(f"{path}: expected the record of a run, got {type(error).__name__}: {error}.") from error
    if missing:
        raise SystemExit(f"{path}: expected the record of a run, got one without {', '.join(missing)}.")
    return record


def load_pipeline(folder: Path, limits: Data, device: str) -> DDIMPipeline:
    """The pipeline of a folder in float32, once it is shown to be small enough to come with the package."""
    try:
        pipeline = DDIMPipeline.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError, SafetensorError) as error:
        raise SystemExit(f"{folder}: expected a DDIM pipeline folder, got {type(error).__name__}: {error}.") from error
    parameters = sum(p.numel() for p in pipeline.unet.parameters())
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if parameters > limits.most_parameters or size > limits.most_bytes:
        raise SystemExit(
            f"{folder}: expected at most {limits.most_parameters:,} parameters and {limits.most_bytes:,} bytes, got "
            f"{parameters:,} and {size:,}. The model comes with the package. Train one with fewer --channels."
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def stage(options: argparse.Namespace) -> Path:
    """The working folder with a copy of the pipeline; samples of an earlier run stay if all that made them is equal."""
    working = options.output / f"{options.data}.making"
    weights = options.run / "pipeline" / WEIGHTS
    if not weights.is_file():
        raise SystemExit(f"{weights}: expected the weights of a pipeline, got no file. Give the folder of a run.")
    settings = {name: getattr(options, name) for name in ("samples", "steps", "batch", "seed")}
    key = json.dumps({"weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(), **settings})
    recorded = working / "key.json"
    if not recorded.is_file() or recorded.read_text() != key:
        shutil.rmtree(working, ignore_errors=True)
        (working / "samples").mkdir(parents=True)
        shutil.copytree(options.run / "pipeline", working / options.data, copy_function=shutil.copyfile)
        # Last: a copy that was interrupted has no key, and is made again.
        recorded.write_text(key)
    return working


def generate(pipeline: DDIMPipeline, folder: Path, options: argparse.Namespace) -> Tensor:
    """(N, C, H, W) uint8 samples; each batch has a seed of its own and a file, so that a restart goes on."""
    parts, made, started = [], 0, time.time()
    for index, first in enumerate(range(0, options.samples, options.batch)):
        count = min(options.batch, options.samples - first)
        path = folder / f"{index:04d}.npy"
        if not path.is_file():
            generator = torch.Generator().manual_seed(options.seed + index)
            images = pipeline(count, generator, num_inference_steps=options.steps, output_type="np").images
            np.save(path.with_suffix(".tmp.npy"), np.round(images * 255).astype(np.uint8))
            path.with_suffix(".tmp.npy").replace(path)
            made += count
            rate = made / (time.time() - started)
            left = (options.samples - first - count) / rate / 60
            print(f"samples {first + count} of {options.samples}  {rate:.1f} images/s  {left:.1f} min left", flush=True)
        parts.append(np.load(path))
    return torch.from_numpy(np.concatenate(parts)).permute(0, 3, 1, 2)


def judge(classifier: Classifier, images: Tensor) -> dict[str, Any]:
    """Share taken with confidence over 0.9, and entropy -sum p_k ln p_k of the histogram of classes, in nats."""
    predicted = probabilities(classifier, images)
    counts = predicted.argmax(-1).bincount(minlength=classifier.classes)
    p = counts[counts > 0].double() / counts.sum()
    return {
        "count": len(images),
        "confident_share": (predicted.amax(-1) > CONFIDENT).double().mean().item(),
        "class_entropy_nats": -(p * p.log()).sum().item() + 0.0,
        "class_counts": counts.tolist(),
    }


def distance(classifier: Classifier, images: Tensor, others: Tensor, device: str) -> dict[str, Any]:
    """Frechet distance of two sets of uint8 images (N, C, H, W) of one size, on the features of the classifier."""
    extract = ClassifierFeatures(classifier, "judge", device=device)
    sides = [
        Moments.of(torch.cat([extract(part.permute(0, 2, 3, 1)).pooled for part in side.split(500)]))
        for side in (images, others)
    ]
    classifier.cpu()
    return {"value": frechet_distance(*sides), "count": len(images), "features": extract.dimension}


def draw_grid(images: Tensor, path: Path, side: int = 8, zoom: int = 2) -> None:
    """The first side x side images as one PNG, each pixel `zoom` wide, with a gap of two pixels between images."""
    count, channels, height, width = images[: side * side].shape
    rows, columns = zoom * height + 2, zoom * width + 2
    grid = np.full((side * rows + 2, side * columns + 2, channels), 255, np.uint8)
    for index in range(count):
        top, left = 2 + index // side * rows, 2 + index % side * columns
        enlarged = images[index].permute(1, 2, 0).numpy().repeat(zoom, 0).repeat(zoom, 1)
        grid[top : top + zoom * height, left : left + zoom * width] = enlarged
    Image.fromarray(grid[..., 0] if channels == 1 else grid).save(path, optimize=True)


def command(script: str, record: dict[str, Any], arguments: Sequence[str]) -> str:
    """The call of a training script that made `record`, its training.json; file names only, the output last."""
    words = [f"--{name.replace('_', '-')} {record[name]}" for name in arguments]
    words += [f"--layers {record['layers']}"] if "layers" in record and "layers" not in arguments else []
    words += [f"--{flag}" for flag in ("flip", "compile") if record.get(flag)]
    return f"python training/{script} {' '.join(words)} -o {record['output']}"


def write_card(
    template: Path, folder: Path, training: dict[str, Any], judged: dict[str, Any], metrics: dict[str, Any]
) -> None:
    """README.md of the model: the template with the figures filled in."""
    values = {name: training[name] for name in (*UNET_ARGUMENTS, "device")}
    values |= {name: metrics[name] for name in ("steps", "seed", "batch", "threshold", "torch", "diffusers")}
    values |= {
        "unet_batch": training["batch"],
        "training_command": "\n".join(
            command("train_reference.py", {**training, **call}, UNET_ARGUMENTS) for call in training["calls"]
        ),
        "weightings": ", then ".join(f"{c['weighting']} from image {c['from_image']:,}" for c in training["calls"]),
        "classifier_command": command("train_classifier.py", judged, CLASSIFIER_ARGUMENTS),
        "assets_command": f"python training/make_assets.py --data {metrics['data']} --run {training['output']} "
        f"--classifier {judged['output']} "
        f"--test-images {judged['test_images']} --samples {metrics['samples']['count']} "
        + " ".join(f"--{name} {metrics[name]}" for name in ("steps", "batch", "seed")),
        "seed_of_training": training["seed"],
        "test_accuracy": f"{judged['test_accuracy']:.2%}",
        "seconds": f"{training['training_seconds']:,}",
        "images_seen": f"{training['images_seen']:,}",
        "optimizer_steps": f"{training['step']:,}",
        "parameters": f"{metrics['parameters']:,}",
        "megabytes": f"{metrics['bytes'] / 1e6:.1f}",
        "frechet_distance": f"{metrics['frechet_distance']['value']:.3f}",
        "features": metrics["frechet_distance"]["features"],
        "largest_entropy": f"{math.log(len(metrics['samples']['class_counts'])):.3f}",
    }
    for name in ("samples", "test_images"):
        values[f"{name}_count"] = f"{metrics[name]['count']:,}"
        values[f"{name}_confident"] = f"{metrics[name]['confident_share']:.3f}"
        values[f"{name}_entropy"] = f"{metrics[name]['class_entropy_nats']:.3f}"
    (folder / "README.md").write_text(Template(template.read_text()).substitute(values))


def install(made: Path, target: Path) -> None:
    """Put a finished folder instead of the old one, if there is one."""
    old = target.with_name(f"{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.replace(old)
    made.replace(target)
    shutil.rmtree(old, ignore_errors=True)


def load_real(options: argparse.Namespace, size: int) -> Tensor:
    """As many test images as there will be samples: distances are taken at equal counts."""
    real = load_images(options.test_images, size)
    if len(real) < options.samples:
        raise SystemExit(
            f"{options.test_images}: expected at least {options.samples} images, got {len(real)}. Distances are taken "
            "at equal counts. Give fewer --samples."
        )
    return real[: options.samples]


def measure(
    options: argparse.Namespace, pipeline: DDIMPipeline, images: Tensor, real: Tensor, folder: Path
) -> dict[str, Any]:
    """What metrics.json holds: the check on the samples, the same on as many test images, and what made them."""
    try:
        classifier = load_classifier(options.classifier)
    except FormatError as error:
        raise SystemExit(str(error)) from error
    weights = folder / WEIGHTS
    return {
        "data": options.data,
        "samples": judge(classifier, images),
        "test_images": judge(classifier, real),
        "frechet_distance": distance(classifier, images, real, options.device),
        "threshold": CONFIDENT,
        "scheduler": type(pipeline.scheduler).__name__,
        **{name: getattr(options, name) for name in ("steps", "seed", "batch")},
        "parameters": sum(p.numel() for p in pipeline.unet.parameters()),
        "bytes": weights.stat().st_size,
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Check the inputs, sample, measure, write the card, and put both folders in place."""
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    training = read_record(options.run / "training.json", UNET_RECORD)
    judged = read_record(options.classifier / "training.json", CLASSIFIER_RECORD)
    real, working = load_real(options, training["size"]), stage(options)
    names, folder = (options.data, f"{options.data}_classifier"), working / options.data
    pipeline = load_pipeline(folder, DATA[options.data], options.device)
    images = generate(pipeline, working / "samples", options)
    metrics = measure(options, pipeline, images, real, folder)
    draw_grid(images, folder / "samples.png")
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    (folder / "training.json").write_text(json.dumps(training, indent=1) + "\n")
    write_card(DATA[options.data].card, folder, training, judged, metrics)
    shutil.rmtree(working / names[1], ignore_errors=True)
    (working / names[1]).mkdir()
    for name in ("config.json", "model.safetensors", "training.json"):
        shutil.copyfile(options.classifier / name, working / names[1] / name)
    for name in names:
        install(working / name, options.output / name)
    shutil.rmtree(working)
    samples = metrics["samples"]
    print(
        f"saved {' and '.join(str(options.output / name) for name in names)}\n"
        f"confident share {samples['confident_share']:.3f} (aim {LEAST_CONFIDENT}; "
        f"test images {metrics['test_images']['confident_share']:.3f}), "
        f"class entropy {samples['class_entropy_nats']:.3f} nats (aim {LEAST_ENTROPY}; "
        f"test images {metrics['test_images']['class_entropy_nats']:.3f})\n"
        f"Frechet distance to as many test images {metrics['frechet_distance']['value']:.3f}"
    )


if __name__ == "__main__":
    main()
