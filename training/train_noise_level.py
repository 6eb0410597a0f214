"""Train a small network that says how noisy an image is (`NoiseLevelEstimator`), on any array of images, in minutes.

    python training/train_noise_level.py --images train_images.npy -o runs/noise_level --minutes 5

Images, runs and restarts are as in train_reference.py; the noise is that of its schedules at uniform timesteps.
`OUT/pipeline/estimator` loads with `NoiseLevelEstimator.from_pretrained`.
"""

import argparse
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from torch import Tensor
from train_reference import Task, add_arguments, build_scheduler, fit, load_images

from modiff.sampling.noise_level import NoiseLevelEstimator

PART = "estimator"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with the values that trained the embedded estimator as defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", default="16,32,64,64", help="channels of each convolution, comma-separated")
    add_arguments(parser, batch=128, learning_rate=2e-3)
    parser.set_defaults(minutes=5.0, ema=0.99, weighting="uniform")  # of the loop; the loss weighs nothing
    return parser.parse_args(arguments)


def loss_of(scheduler: DDIMScheduler) -> Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]:
    """(log(1 - ab) - log(1 - a))^2 at uniform timesteps, the mean over the batch."""
    logarithms = (1 - scheduler.alphas_cumprod.double()).log().float()

    def loss(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        steps = torch.randint(0, len(logarithms), (len(images),), device=images.device)
        noisy = scheduler.add_noise(images, torch.randn_like(images), steps)
        return (model(noisy).float() - logarithms.to(images.device)[steps]).square().mean()

    return loss


def write(model: NoiseLevelEstimator, _: DDIMScheduler, folder: Path) -> None:
    """The estimator, in a folder of diffusers."""
    model.save_pretrained(folder / PART)


def train(options: argparse.Namespace) -> None:
    """An estimator."""
    torch.manual_seed(options.seed)
    images = load_images(options.images, options.size)
    channels = [int(width) for width in options.channels.split(",")]
    if options.size < 2 ** len(channels):
        raise SystemExit(f"--channels {options.channels}: expected at most {options.size.bit_length() - 1} of them. "
                         f"Each halves images of --size {options.size}.")  # fmt: skip
    model = NoiseLevelEstimator(in_channels=images.shape[1], channels=tuple(channels))
    fit(Task(model, images, write, PART, loss=loss_of(build_scheduler(options.schedule))), options)


if __name__ == "__main__":
    for stop in (signal.SIGINT, signal.SIGTERM):  # a shell that starts jobs in the background ignores Ctrl-C for them
        signal.signal(stop, signal.default_int_handler)
    train(parse_arguments())
