"""Train a U-Net with two outputs for decoupled diffusion (`DDMScheduler`), and save it as a diffusers pipeline folder.

    python training/train_ddm.py --images train_images.npy --begin-with embedded -o runs/ddm --minutes 120

Images, runs and restarts are as in train_reference.py. `--begin-with` copies the weights of a U-Net that predicts
noise, the embedded model's or those of a pipeline folder: its last layer is repeated for each output, and the options
of the architecture do not count. `OUT/pipeline` loads with `UnconditionalPipeline` of modiff.generate.samplers.
"""

import argparse
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor
from train_reference import BETAS, Task, add_architecture, add_arguments, build_model, fit, load_images

from modiff.assets import MODELS, model_folder
from modiff.generate.samplers import UnconditionalPipeline
from modiff.sampling.ddm import OUTPUTS, DDMScheduler

HEADS = ("conv_out.weight", "conv_out.bias")
LARGEST_WEIGHT = 10.0


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with the values that trained the embedded DDM as defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attenuation", choices=OUTPUTS["decomposition"], default="constant")
    parser.add_argument("--begin-with", metavar="MODEL", help=f"{', '.join(MODELS)}, or a pipeline folder")
    add_architecture(parser)
    add_arguments(parser, batch=32, learning_rate=2e-4)
    parser.set_defaults(weighting="uniform")  # of the loop; the loss has weights of its own
    return parser.parse_args(arguments)


def begun_with(name: str, outputs: int) -> UNet2DModel:
    """The U-Net of a pipeline that predicts noise, with its last layer repeated for each output."""
    folder = model_folder(name) if name in MODELS else Path(name)
    try:
        trained = UNet2DModel.from_pretrained(folder, subfolder="unet", dtype=torch.float32)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise SystemExit(
            f"--begin-with {name}: expected a pipeline folder with a UNet2DModel, got: {reason}"
        ) from error
    channels = trained.config.in_channels
    if trained.config.out_channels != channels:
        raise SystemExit(f"--begin-with {name}: expected {channels} output channels, those of the noise, got "
                         f"{trained.config.out_channels}. Give a model that predicts noise alone.")  # fmt: skip
    config = {key: value for key, value in trained.config.items() if key != "_name_or_path"}  # a folder of this machine
    model = UNet2DModel.from_config(config, out_channels=outputs * channels)
    state = trained.state_dict()
    model.load_state_dict(state | {name: torch.cat([state[name]] * outputs) for name in HEADS})
    return model


def loss_of(scheduler: DDMScheduler) -> Callable[[Callable[..., Any], Tensor], Tensor]:
    """The published loss without its perceptual term, at uniform t in (0, 1].

    constant, linear: |dC|^2 / t + |dK|^2 / t + |deps|^2 / (1 - t) + (1 - t)^2 |dx_0|. const_2: dC and deps weigh
    1 + ((1-t)/t)^2 and 1 + (t/(1-t))^2. Means over the pixels. No weight is above 10 but that of C, whose error
    falls with t as its weight grows.
    """

    def loss(model: Callable[..., Any], images: Tensor) -> Tensor:
        """Of one batch, at one time and noise for each image."""
        noise, time = torch.randn_like(images), 1 - torch.rand(len(images), device=images.device)
        linear, square = scheduler.config.attenuation == "linear", scheduler.config.attenuation == "const_2"
        curve = torch.randn_like(images).clamp(-1, 1) if linear else torch.zeros_like(images)
        noisy = scheduler.add_noise(images, noise, time, curve)
        t = time.reshape(-1, 1, 1, 1)
        a, s = scheduler.levels(t)
        timesteps = scheduler.timestep(time).to(images)
        output = model(noisy / (a**2 + s**2).sqrt(), timesteps, return_dict=False)[0].float()
        made = scheduler.decompose(output, noisy, time)
        slope_error, noise_error = made.slope + images + curve / 2, made.noise - noise
        of_slope, of_noise = (1 + ((1 - t) / t) ** 2, 1 + (t / (1 - t)) ** 2) if square else (1 / t, 1 / (1 - t))
        errors = of_slope * slope_error**2 + of_noise.clamp(max=LARGEST_WEIGHT) * noise_error**2
        errors = errors + (1 - t) ** 2 * (scheduler.image(made, noisy, time) - images).abs()
        if linear:
            errors = errors + (1 / t).clamp(max=LARGEST_WEIGHT) * (made.curve - curve) ** 2
        return errors.mean()

    return loss


def train(options: argparse.Namespace) -> None:
    """A U-Net with two outputs, or with three for linear attenuation."""
    torch.manual_seed(options.seed)
    images = load_images(options.images, options.size)
    scheduler = DDMScheduler(
        beta_schedule=BETAS[options.schedule], attenuation=options.attenuation, prediction_type="decomposition"
    )
    channels = images.shape[1]
    if options.begin_with:
        model = begun_with(options.begin_with, scheduler.outputs)
    else:
        model = build_model(options, channels, scheduler.outputs * channels)
    if (model.config.in_channels, model.config.sample_size) != (channels, options.size):
        raise SystemExit(f"--begin-with {options.begin_with}: expected a model of {channels} channels at --size "
                         f"{options.size}, got {model.config.in_channels} at {model.config.sample_size}.")  # fmt: skip

    def write(model: UNet2DModel, _: DDIMScheduler, folder: Path) -> None:
        UnconditionalPipeline(unet=model, scheduler=scheduler).save_pretrained(folder)

    fit(Task(model, images, write, "unet", loss=loss_of(scheduler)), options)


if __name__ == "__main__":
    for stop in (signal.SIGINT, signal.SIGTERM):  # a shell that starts jobs in the background ignores Ctrl-C for them
        signal.signal(stop, signal.default_int_handler)
    train(parse_arguments())
