"""Train the small classifier that serves as feature extractor and as judge of generated images.

    python training/train_classifier.py --images train_images.npy --labels train_labels.npy \\
        --test-images test_images.npy --test-labels test_labels.npy -o runs/classifier

Images are `.npy` arrays (N, H, W) or (N, H, W, C) of uint8, padded with black to `--size`; labels (N,) integers from 0.
Writes `OUT/config.json`, `OUT/model.safetensors` and `OUT/training.json` at the end; a few minutes on one core.
An interrupted run leaves OUT as it was.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from train_reference import load_array, load_images

from modiff.errors import ConfigError
from modiff.evaluate.features.classifier import Classifier, load_classifier, save_classifier

CONFIDENT = 0.9


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with the values that trained the embedded classifier as defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="(N, H, W[, C]) uint8 .npy file to train on")
    parser.add_argument("--labels", type=Path, required=True, help="(N,) integer .npy file")
    parser.add_argument("--test-images", type=Path, required=True)
    parser.add_argument("--test-labels", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the classifier")
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--size", type=int, default=32, help="images are padded to SIZE x SIZE")
    parser.add_argument("--channels", default="16,32,64,128", help="channels per block; the last is the feature count")
    parser.add_argument("--layers", type=int, default=1, help="convolutions per block")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=6e-3, help="peak of the one-cycle schedule")
    parser.add_argument("--weight-decay", type=float, default=0.02)
    parser.add_argument("--shift", type=int, default=2, help="images are moved by up to this many pixels at random")
    parser.add_argument("--flip", action="store_true", help="random horizontal flips")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="bfloat16 on a GPU")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def load_labels(path: Path, images: Tensor) -> Tensor:
    """(N,) int64 class numbers, one for each image."""
    labels = load_array(path, "an .npy array of labels")
    valid = labels.shape == (len(images),) and labels.dtype.kind in "iu" and labels.min() >= 0
    if not valid:
        raise SystemExit(
            f"{path}: expected {len(images)} integers from 0, one for each image, got {labels.shape} {labels.dtype}. "
            "Give the labels that belong to the images."
        )
    return torch.from_numpy(labels.astype(np.int64))


def scale(images: Tensor) -> Tensor:
    """uint8 in 0..255 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def shift_at_random(images: Tensor, most: int) -> Tensor:
    """Move each image of (N, C, H, W) by up to `most` pixels along both axes; what comes in is black."""
    padded = nn.functional.pad(images, (most, most, most, most))
    count, channels, height, width = images.shape
    offsets = torch.randint(0, 2 * most + 1, (2, count, 1)).to(images.device)
    rows = (torch.arange(height, device=images.device) + offsets[0])[:, None, :, None]
    columns = (torch.arange(width, device=images.device) + offsets[1])[:, None, None, :]
    image, plane = torch.arange(count, device=images.device), torch.arange(channels, device=images.device)
    return padded[image[:, None, None, None], plane[:, None, None], rows, columns]


def flip_at_random(images: Tensor) -> Tensor:
    """Mirror every other image of (N, C, H, W), drawn at random, left to right."""
    mirrored = (torch.rand(len(images), 1, 1, 1) < 0.5).to(images.device)
    return torch.where(mirrored, images.flip(3), images)


@torch.no_grad()
def probabilities(model: Classifier, images: Tensor, batch: int = 500) -> Tensor:
    """(N, classes) probabilities of uint8 images."""
    model.eval()
    return torch.cat([model(scale(part)).softmax(-1) for part in images.split(batch)])


def build_model(options: argparse.Namespace, images: Tensor, labels: Tensor) -> Classifier:
    """The classifier for as many channels and classes as the data has."""
    try:
        channels = tuple(int(c) for c in options.channels.split(","))
        return Classifier(channels, images.shape[1], int(labels.max()) + 1, options.layers)
    except (ConfigError, ValueError) as error:
        raise SystemExit(f"--channels {options.channels}: expected numbers with commas. {error}") from error


def augmented(images: Tensor, options: argparse.Namespace) -> Tensor:
    """A batch as the model sees it in training, float32, channels last."""
    moved = shift_at_random(images, options.shift)
    return scale(flip_at_random(moved) if options.flip else moved).contiguous(memory_format=torch.channels_last)


def train(options: argparse.Namespace, images: Tensor, labels: Tensor) -> Classifier:
    """Cross-entropy, AdamW, one-cycle learning rate, random shifts; every image once an epoch; returned on the CPU."""
    torch.manual_seed(options.seed)
    model = build_model(options, images, labels).to(options.device, memory_format=torch.channels_last)
    images, labels = images.to(options.device), labels.to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay)
    steps = options.epochs * -(-len(images) // options.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.learning_rate, total_steps=steps)
    seen, last, since = 0, 0, time.time()
    for epoch in range(options.epochs):
        model.train()
        for picked in torch.randperm(len(images)).split(options.batch):
            picked = picked.to(options.device)
            with torch.autocast(torch.device(options.device).type, torch.bfloat16, enabled=options.device != "cpu"):
                loss = nn.functional.cross_entropy(model(augmented(images[picked], options)), labels[picked])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            seen += len(picked)
            if time.time() - since > 5 or seen == options.epochs * len(images):
                rate = (seen - last) / (time.time() - since)
                last, since = seen, time.time()
                share = seen / (options.epochs * len(images))
                print(f"epoch {epoch + 1} of {options.epochs}  {share:.0%}  loss {loss.item():.3f}  "
                      f"{rate:.0f} images/s", flush=True)  # fmt: skip
    return model.cpu()


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, save, and measure what was saved on the test images."""
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    images = load_images(options.images, options.size)
    labels = load_labels(options.labels, images)
    test_images = load_images(options.test_images, options.size)
    test_labels = load_labels(options.test_labels, test_images)
    started = time.time()
    model = train(options, images, labels)
    seconds = time.time() - started
    save_classifier(model, options.output)
    predicted = probabilities(load_classifier(options.output), test_images)
    card = {k: v.name if isinstance(v, Path) else v for k, v in vars(options).items()}
    card |= {
        "images_seen": options.epochs * len(images),
        "training_seconds": round(seconds),
        "parameters": sum(p.numel() for p in model.parameters()),
        "test_accuracy": (predicted.argmax(-1) == test_labels).float().mean().item(),
        "test_confident_share": (predicted.amax(-1) > CONFIDENT).float().mean().item(),
    }
    (options.output / "training.json").write_text(json.dumps(card, indent=1) + "\n")
    print(f"saved {options.output}: test accuracy {card['test_accuracy']:.2%}, "
          f"{card['test_confident_share']:.1%} of the test images taken with confidence over {CONFIDENT}")  # fmt: skip


if __name__ == "__main__":
    main()
